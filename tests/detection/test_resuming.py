"""Runs that are killed and go on: bit for bit, by their own settings, from whole files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.engine.train_loop import TrainerBase

from detection import train_net
from detection.figures import read_metrics
from detection.settings import traces_of_run
from pcka.engine.config import ConfigError

pytestmark = pytest.mark.slow

STUDENTS_SIZE = str(
    ["MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
     "MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.FPN.OUT_CHANNELS", 32]
)  # fmt: skip


def _checkpoint(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


def _assert_equal(one, other, path=""):
    """Everything but times, and evaluations that came after the checkpoint."""
    if path == ".metrics":
        one, other = ({n: v for n, v in run.items() if "loss" in n} for run in (one, other))
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            _assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            _assert_equal(*pair, f"{path}[{index}]")
    else:
        assert one == other, path


def _cut_after_step_2(whole, cut):
    """What a run leaves that is killed after step 3: the checkpoint of step 2 is its last."""
    shutil.copytree(whole, cut)
    (cut / "model_final.pth").unlink()
    (cut / "last_checkpoint").write_text("model_0000001.pth")


@pytest.mark.parametrize(
    ("mixed", "methods"),
    [("False", "['PCKA']"), ("True", "['PCKA']"), ("False", "['CROSSKD', 'DENSEKD', 'FGD']")],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, arguments, mixed, methods):
    keys = ("DISTILL.TEACHER.OPTS", str(["MODEL.FPN.OUT_CHANNELS", 64]))  # needs adapters
    keys += ("SOLVER.AMP.ENABLED", mixed, "DISTILL.METHODS", methods, "DISTILL.CROSSKD.DEPTH", "1")
    train_net.main(arguments(tmp_path / "whole", 4, *keys))
    _cut_after_step_2(tmp_path / "whole", tmp_path / "cut")
    train_net.main(arguments(tmp_path / "cut", 4, *keys, flags=["--resume"]))
    whole, cut = (_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert {"model", "optimizer", "scheduler", "adapters", "losses", "run"} <= whole.keys()
    assert whole["optimizer"]["state"]
    assert whole["adapters"]
    _assert_equal(whole, cut)


def test_a_killed_segmenter_goes_on_bit_for_bit(tmp_path, arguments):
    """Its head draws what it drops, its loader where it crops."""
    student = {
        "BACKBONE.NAME": "build_dilated_resnet_backbone", "RESNETS.RES5_DILATION": "4",
        "SEM_SEG_HEAD.NAME": "PSPHead", "SEM_SEG_HEAD.IN_FEATURES": "['res4', 'res5']",
        "SEM_SEG_HEAD.COMMON_STRIDE": "8", "SEM_SEG_HEAD.NORM": "BN",
    }  # fmt: skip
    keys = [word for key, value in student.items() for word in (f"MODEL.{key}", value)]
    keys += ["DISTILL.LEVELS", "['res4:p4', 'sem_seg']", "DISTILL.PCKA.PATCH_SIZES", "[4]"]
    keys += ["DISTILL.METHODS", "['PCKA', 'PIXELKD', 'PIXELCKA', 'IFVD']"]
    keys += ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE"]
    keys += ["[96, 64]", "INPUT.RANDOM_FLIP", "horizontal", "TEST.EVAL_PERIOD", "2"]
    keys += ["SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR"]
    made = {"config": "../digits_pixels/pcka"}
    results = train_net.main(arguments(tmp_path / "whole", 4, *keys, **made))
    assert 0 <= results["sem_seg"]["mIoU"] <= 100
    _cut_after_step_2(tmp_path / "whole", tmp_path / "cut")
    train_net.main(arguments(tmp_path / "cut", 4, *keys, flags=["--resume"], **made))
    whole, cut = (_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert whole["adapters"]
    assert any(name.startswith("sem_seg_head.auxiliary") for name in whole["model"])
    _assert_equal(whole, cut)


def test_evaluations_in_between_change_nothing(tmp_path, arguments):
    """The flips are drawn from NumPy, as are the sizes of an evaluation's images."""
    keys = ("INPUT.RANDOM_FLIP", "horizontal")
    for period in (0, 1):
        folder = tmp_path / str(period)
        train_net.main(arguments(folder, 4, *keys, "TEST.EVAL_PERIOD", str(period)))
    without, between = (_checkpoint(tmp_path / str(period)) for period in (0, 1))
    _assert_equal(without, between)


def test_a_killed_run_with_evaluations_in_between_goes_on_bit_for_bit(tmp_path, arguments):
    keys = ("INPUT.RANDOM_FLIP", "horizontal", "TEST.EVAL_PERIOD", "2")
    train_net.main(arguments(tmp_path / "whole", 4, *keys))
    _cut_after_step_2(tmp_path / "whole", tmp_path / "cut")
    train_net.main(arguments(tmp_path / "cut", 4, *keys, flags=["--resume"]))
    _assert_equal(*(_checkpoint(tmp_path / name) for name in ("whole", "cut")))


def test_a_run_that_is_killed_before_it_writes_loses_no_figure(tmp_path, arguments, monkeypatch):
    keys = ("DISTILL.LOG_PERIOD", "2", "TEST.EVAL_PERIOD", "1")
    train_net.main(arguments(tmp_path / "whole", 4, *keys))
    figures = read_metrics(tmp_path / "whole" / "metrics.json")
    assert [step for step, _ in figures["total_loss"]] == [1, 3]
    assert [step for step, _ in figures["cka/p3"]] == [0, 2]
    for lost in ("from the checkpoint on", "nothing"):
        _cut_after_step_2(tmp_path / "whole", tmp_path / lost)
        path = tmp_path / lost / "metrics.json"
        written = path.read_text().splitlines(keepends=True) if lost == "nothing" else []
        path.write_text("".join(written))
        train_net.main(arguments(tmp_path / lost, 4, *keys, flags=["--resume"]))
        for name, points in read_metrics(path).items():
            if name.startswith(("total_loss", "loss", "cka", "distill_grad")):
                assert points == figures[name], name
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert sum("total_loss" in line for line in lines[len(written) :]) == 1 + (not written)


def test_a_run_killed_in_its_first_steps_goes_on_when_it_logs_every_step(tmp_path, arguments):
    """detectron2 has not timed a step by then, and divides by the steps since the last line."""
    keys = ("DISTILL.LOG_PERIOD", "1")
    train_net.main(arguments(tmp_path / "whole", 4, *keys))
    _cut_after_step_2(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "metrics.json").write_text("")  # killed before it wrote
    train_net.main(arguments(tmp_path / "cut", 4, *keys, flags=["--resume"]))
    assert _checkpoint(tmp_path / "cut")["iteration"] == 3


def test_a_killed_run_goes_on_bit_for_bit_where_the_loader_starts_late(
    tmp_path, arguments, monkeypatch
):
    """As in detectron2's main branch, whose loader draws its seed at the first step."""

    def init(self, model, data_loader, optimizer):
        TrainerBase.__init__(self)
        model.train()
        self.model, self.data_loader, self.optimizer = model, data_loader, optimizer
        self.started = None

    def started(self):
        if self.started is None:
            self.started = iter(self.data_loader)
        return self.started

    monkeypatch.setattr(SimpleTrainer, "__init__", init)
    monkeypatch.setattr(SimpleTrainer, "_data_loader_iter", property(started), raising=False)
    train_net.main(arguments(tmp_path / "whole", 4))
    _cut_after_step_2(tmp_path / "whole", tmp_path / "cut")
    train_net.main(arguments(tmp_path / "cut", 4, flags=["--resume"]))
    _assert_equal(*(_checkpoint(tmp_path / name) for name in ("whole", "cut")))


@pytest.fixture(scope="module")
def short_run(tmp_path_factory, arguments):
    """A run of two steps; copy it before changing it."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    train_net.main(arguments(folder, 2))
    return folder


@pytest.fixture
def left(short_run, tmp_path):
    """What the short run has left, as a copy."""
    shutil.copytree(short_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("DISTILL.METHODS", "['FITNET']", r"DISTILL.METHODS \(had \['PCKA'\], now \['FITNET'\]\)"),
        ("SOLVER.BASE_LR", "0.3", r"SOLVER.BASE_LR \(had 0.02, now 0.3\)"),
        ("DISTILL.TEACHER.OPTS", "['MODEL.FPN.OUT_CHANNELS', 64]", r"DISTILL.TEACHER.OPTS"),
    ],
)
def test_a_run_goes_on_by_its_own_settings_alone(left, arguments, key, value, named):
    before = (left / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=f"other values of {named}.*another OUTPUT_DIR"):
        train_net.main(arguments(left, 4, key, value, flags=["--resume"]))
    assert (left / "config.yaml").read_bytes() == before


def test_a_run_may_go_on_longer_and_with_files_elsewhere(left, arguments, caplog, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "moved")
    moved = ("DATASETS.DIGITS.ROOT", str(tmp_path / "moved"), "TEST.EVAL_PERIOD", "2")
    moved += ("DISTILL.TEACHER.HEAD", "True")  # tries the teacher, and changes no step
    train_net.main(arguments(left, 3, *moved, flags=["--resume"]))
    assert _checkpoint(left)["iteration"] == 2
    assert "files in other places: DATASETS.DIGITS.ROOT" in caplog.text


def test_a_checkpoint_of_another_configuration_is_refused(left, arguments):
    (left / "config.yaml").unlink()
    wider = ("DISTILL.TEACHER.OPTS", str(["MODEL.FPN.OUT_CHANNELS", 64]))  # needs adapters
    named = r"from another configuration \(it has different weights of adapters.p3, adapters.p4,"
    with pytest.raises(ConfigError, match=named):
        train_net.main(arguments(left, 4, *wider, flags=["--resume"]))
    (left / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"\(it has different weights of MGD\)"):
        keys = ("DISTILL.METHODS", "['PCKA', 'MGD']")
        train_net.main(arguments(left, 4, *keys, flags=["--resume"]))
    (left / "config.yaml").unlink()
    torch.save({"model": _checkpoint(left)["model"]}, left / "model_final.pth")
    with pytest.raises(ConfigError, match=r"model_final.pth: has no training state to resume"):
        train_net.main(arguments(left, 4, flags=["--resume"]))


@pytest.mark.parametrize("fault", ["truncated", "diverged", "missing", "unnamed"])
def test_beside_a_damaged_checkpoint_the_last_whole_one_is_named(left, arguments, fault):
    shutil.copy(left / "model_final.pth", left / "model_0000000.pth")
    (left / "model_0000001.pth").write_bytes(b"")
    whole = (left / "model_final.pth").read_bytes()
    (left / "model_final.pth").write_bytes(whole[: len(whole) // 2])
    if fault == "diverged":
        shutil.copy(left / "model_0000000.pth", left / "model_final.pth")
        content = torch.load(left / "model_final.pth", weights_only=True)
        next(iter(content["model"].values())).fill_(torch.nan)
        torch.save(content, left / "model_final.pth")
    if fault == "missing":
        (left / "model_final.pth").unlink()
    if fault == "unnamed":
        (left / "last_checkpoint").write_text("")
    named = r"model_0000000.pth next to it is intact: .* write that name into .*last_checkpoint"
    with pytest.raises(ConfigError, match=named):
        train_net.main(arguments(left, 4, flags=["--resume"]))
    (left / "model_0000000.pth").unlink()
    with pytest.raises(ConfigError, match=r"no other is intact: remove .*last_checkpoint"):
        train_net.main(arguments(left, 4, flags=["--resume"]))


def test_a_run_is_not_started_over_another(left, arguments):
    before = {path: path.read_bytes() for path in left.iterdir() if path.is_file()}
    named = r"run \(last_checkpoint, metrics.json, result.json\); continue it with --resume, or cho"
    with pytest.raises(ConfigError, match=named):
        train_net.main(arguments(left, 2, "SOLVER.BASE_LR", "0.3"))
    assert {path: path.read_bytes() for path in left.iterdir() if path.is_file()} == before
    for name in ("last_checkpoint", "result.json"):
        (left / name).unlink()
    assert traces_of_run(left) == ["metrics.json"]  # of a run killed before its first checkpoint
    (left / "metrics.json").write_text("")
    assert traces_of_run(left) == []  # no step was made


def test_a_finished_run_without_its_checkpoint_is_not_trained_over(left, arguments):
    (left / "last_checkpoint").unlink()
    before = (left / "result.json").read_bytes()
    with pytest.raises(ConfigError, match=r"a finished run without its checkpoint.*result.json"):
        train_net.main(arguments(left, 2, "DISTILL.METHODS", "['PKD']", flags=["--resume"]))
    assert (left / "result.json").read_bytes() == before


def test_a_teacher_in_the_students_folder_is_refused_before_it_is_overwritten(left, arguments):
    before = (left / "model_final.pth").read_bytes()
    teacher = ("DISTILL.TEACHER.WEIGHTS", str(left / "model_final.pth"))
    teacher += ("DISTILL.TEACHER.OPTS", STUDENTS_SIZE)  # it would teach
    with pytest.raises(ConfigError, match=r"TEACHER.WEIGHTS: .*is in OUTPUT_DIR"):
        train_net.main(arguments(left, 4, *teacher))
    assert (left / "model_final.pth").read_bytes() == before


def test_what_killed_runs_left_half_written_is_removed(left, arguments):
    stale = [left / name for name in (".model_final.pth.0123abcd.tmp", ".x.tmp")]
    for path in stale:
        path.touch()
    train_net.main(arguments(left, 2, flags=["--resume"]))
    assert [path.exists() for path in stale] == [False, True]
