"""Going on from files that are missing, damaged, or another run's."""

from __future__ import annotations

import shutil

import pytest
import torch

from classification.models import create_model
from classification.run import PARTS, run_experiment
from pcka.engine.config import ConfigError
from pcka.engine.saved_state import load_state

pytestmark = pytest.mark.usefixtures("without_plots")
ALONE = {"TEACHER.NAME": "", "SOLVER.SCHEDULE": "multistep"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits_config):
    """The folder of a run of two epochs, to be copied."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(tiny_config, finished, tmp_path):
    """``run(**keys)`` goes on with a copy of a finished run; ``run.folder`` holds the copy."""
    if not finished.exists():
        run_experiment(tiny_config(**ALONE, OUTPUT_DIR=finished))
    shutil.copytree(finished, tmp_path / "run")

    def resume(**keys):
        return run_experiment(tiny_config(**{**ALONE, **keys}), resume=True)

    resume.folder = tmp_path / "run"
    resume.checkpoint = resume.folder / "checkpoint.pth"
    return resume


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.name != "log.txt"
            and path.is_file()}  # fmt: skip


def change(run, changed):
    """Write the checkpoint anew, with ``changed`` called on its content."""
    state = torch.load(run.checkpoint, weights_only=True)
    changed(state)
    torch.save(state, run.checkpoint)


@pytest.mark.parametrize(
    "keys", [{"SOLVER.BASE_LR": 1}, {"SOLVER.EPOCHS": 3}, {"SEED": 1}], ids=str
)
@pytest.mark.parametrize("dangling", [False, True])
def test_a_run_without_its_checkpoint_is_not_overwritten(run, keys, dangling):
    run.checkpoint.unlink()
    if dangling:
        run.checkpoint.symlink_to("nowhere")
    before = contents(run.folder)
    expected = r"holds a run \(result.json, .*\) without its checkpoint.pth, .* put that file back"
    with pytest.raises(ConfigError, match=expected):
        run(**keys)
    (run.folder / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"holds a run \(model_best.pth, metrics.jsonl\)"):
        run()
    before.pop(run.folder / "result.json")
    assert contents(run.folder) == before


def test_a_finished_run_whose_checkpoint_was_removed_is_still_finished(run):
    before = run()
    run.checkpoint.unlink()
    files = contents(run.folder)
    assert run() == before
    assert contents(run.folder) == files


@pytest.mark.parametrize("content", ["", "{"])
def test_a_damaged_result_is_written_anew(run, content):
    result = run()
    (run.folder / "result.json").write_text(content)
    assert run() == result
    assert run() == result


@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_that_lacks_a_part_is_named(run, part):
    change(run, lambda state: state.pop(part))
    with pytest.raises(ConfigError, match=rf"cannot be continued from .*no '{part}'; put"):
        run()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda state: state.update(epoch="2"), "its 'epoch' is a str"),
        (lambda state: state["best"].clear(), "its 'best' has no best_accuracy, best_epoch"),
        (lambda state: state.update(config="{"), "its configuration cannot be read"),
        (lambda state: state.update(config="a: 1"), "configuration cannot be read .*unknown key"),
        (lambda state: state["student"].popitem(), "does not fit .* student: other entries: fc"),
        (
            lambda state: state["student"].update({"conv1.weight": torch.zeros(3)}),
            r"student: conv1.weight is torch.float32 \(3,\) for torch.float32 \(16, 3, 3, 3\)",
        ),
        (
            lambda state: state["optimizer"]["state"][2].update(momentum_buffer=torch.zeros(3)),
            r"optimizer: momentum_buffer of parameter 2 is torch.float32 \(3,\) for .*\(16,\)",
        ),
        (
            lambda state: state["optimizer"]["state"][2].update(
                momentum_buffer=torch.zeros(16, dtype=torch.float64)
            ),
            "optimizer: momentum_buffer of parameter 2 is torch.float64",
        ),
        (lambda state: state.update(optimizer={}), "optimizer: its state is none of SGD"),
        (
            lambda state: state["optimizer"]["state"].update({999: {}}),
            "optimizer: its state is none of SGD",
        ),
        (
            lambda state: state["optimizer"]["param_groups"][0]["params"].pop(),
            "optimizer: ",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_computed(
    run, changed, message
):
    change(run, changed)
    before = contents(run.folder)
    with pytest.raises(ConfigError, match=message) as refused:
        run(**{"SOLVER.EPOCHS": 3})
    assert str(run.folder) in str(refused.value) and "another OUTPUT_DIR" in str(refused.value)
    assert contents(run.folder) == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"text"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(run, content):
    run.checkpoint.write_bytes(content)
    with pytest.raises(ConfigError, match=r"from checkpoint\.pth: .*damaged.* another OUTPUT_DIR"):
        run()


def test_one_flipped_bit_of_a_checkpoint_is_found(run):
    content = bytearray(run.checkpoint.read_bytes())
    content[len(content) // 2] ^= 4
    run.checkpoint.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot be continued from checkpoint\.pth: .*damaged"):
        run(**{"SOLVER.EPOCHS": 3})


def test_a_file_that_holds_something_else_is_no_checkpoint(tmp_path):
    torch.save([1], tmp_path / "checkpoint.pth")
    with pytest.raises(ConfigError, match="it holds a list"):
        load_state(tmp_path / "checkpoint.pth", PARTS)


@pytest.fixture
def wide_teacher(tmp_path):
    """A teacher of other widths than the student's."""
    torch.manual_seed(0)
    torch.save(create_model("resnet8x4", 10).state_dict(), tmp_path / "wide.pth")
    keys = {"TEACHER.NAME": "resnet8x4", "TEACHER.WEIGHTS": tmp_path / "wide.pth"}
    return {**keys, "SOLVER.SCHEDULE": "multistep"}


def with_adapters_in_the_losses(state):
    """As a checkpoint has it whose losses have adapters of their own."""
    for name, value in state.pop("adapters").items():
        tap, part = name.split(".")
        state["losses"][f"1.adapters.{tap}.0.{part}"] = value


def test_a_checkpoint_whose_losses_hold_the_adapters_goes_on_to_the_same_end(
    tiny_config, wide_teacher, tmp_path, assert_same_run
):
    def config(name, epochs):
        return tiny_config("pkd", name, **wide_teacher, **{"SOLVER.EPOCHS": epochs})

    run_experiment(config("whole", 3))
    run_experiment(config("parts", 2))
    path = tmp_path / "parts" / "checkpoint.pth"
    state = torch.load(path, weights_only=True)
    assert state["adapters"].keys() == {"last.weight", "last.bias"} and not state["losses"]
    with_adapters_in_the_losses(state)
    torch.save(state, path)
    run_experiment(config("parts", 3), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_two_adapters_of_one_tap_cannot_become_one(tiny_config, wide_teacher, tmp_path):
    both = {"DISTILL.METHODS": "[CE, PKD, CWD]", **wide_teacher}
    run_experiment(tiny_config(**both, **{"SOLVER.EPOCHS": 1}))
    path = tmp_path / "run" / "checkpoint.pth"
    state = torch.load(path, weights_only=True)
    of_second = {f"2.adapters.last.0.{n}": v for n, v in (("weight", 0), ("bias", 0))}
    with_adapters_in_the_losses(state)
    state["losses"] |= of_second
    torch.save(state, path)
    with pytest.raises(
        ConfigError, match=r"losses hold adapters of feature maps \(1\.adapters\.la"
    ):
        run_experiment(tiny_config(**both), resume=True)
