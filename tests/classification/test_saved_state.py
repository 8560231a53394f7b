"""Going on from files that are missing, damaged, or another run's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from classification.run import run_experiment
from classification.saved_run import PARTS
from pcka.engine.config import ConfigError
from pcka.engine.saved_state import check_fits, load_state

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
    with pytest.raises(ConfigError, match=rf"cannot be resumed from .*no '{part}'; restore"):
        run()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda state: state.update(epoch="2"), "its 'epoch' is a str"),
        (lambda state: state["best"].clear(), "its 'best' has no best_accuracy, best_epoch"),
        (lambda state: state.update(config="{"), "its configuration cannot be read"),
        (lambda state: state.update(config="a: 1"), "configuration cannot be read .*unknown key"),
        (lambda state: state["student"].popitem(), "does not fit .* student: entries differ: fc"),
        (
            lambda state: state["student"].update({"conv1.weight": torch.zeros(3)}),
            r"student: conv1.weight is torch.float32 \(3,\), not torch.float32 \(16, 3, 3, 3\)",
        ),
        (
            lambda state: state["optimizer"]["state"][2].update(momentum_buffer=torch.zeros(3)),
            r"optimizer: momentum_buffer of parameter 2 is torch.float32 \(3,\), not .*\(16,\)",
        ),
        (
            lambda state: state["optimizer"]["state"][2].update(
                momentum_buffer=torch.zeros(16, dtype=torch.float64)
            ),
            "optimizer: momentum_buffer of parameter 2 is torch.float64",
        ),
        (lambda state: state.update(optimizer={}), "optimizer: its state is not of SGD"),
        (
            lambda state: state["optimizer"]["state"].update({999: {}}),
            "optimizer: its state is not of SGD",
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


def test_a_momentum_of_another_shape_is_refused_before_a_step_reads_beyond_its_end():
    """By itself, because such a step may end the whole process."""
    optimizer = torch.optim.SGD(torch.nn.Linear(3, 2).parameters(), momentum=0.9)
    saved = optimizer.state_dict()
    saved["state"][1] = {"momentum_buffer": torch.zeros(1)}
    expected = r"momentum_buffer of parameter 1 is torch.float32 \(1,\), not torch.float32 \(2,\)"
    with pytest.raises(ConfigError, match=expected):
        check_fits({"optimizer": saved}, {}, optimizer, Path("checkpoint.pth"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step": torch.zeros(2)}, r"step of parameter 1 is torch.float32 \(2,\), not .*\(\)"),
        (
            {"exp_avg": torch.zeros(1)},
            r"exp_avg of parameter 1 is .*\(1,\), not torch.float32 \(2,\)",
        ),
        ({"exp_avg_sq": None}, "parameter 1 has no exp_avg_sq"),
    ],
)
def test_a_state_that_is_none_of_adamw_is_refused(changed, message):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    check_fits({"optimizer": saved}, {}, optimizer, Path("checkpoint.pth"))
    saved["state"][1] |= changed
    with pytest.raises(ConfigError, match=message):
        check_fits({"optimizer": saved}, {}, optimizer, Path("checkpoint.pth"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda state: state.pop("ema"), "it has no 'ema'"),
        (lambda state: state["ema"].popitem(), "does not fit the models: ema: entries differ: fc"),
    ],
)
def test_a_checkpoint_without_the_averaged_student_is_refused(
    tiny_config, tmp_path, changed, message
):
    keys = {**ALONE, "SOLVER.EPOCHS": 1, "SOLVER.EMA_DECAY": 0.9}
    run_experiment(tiny_config(**keys))
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    state = torch.load(checkpoint, weights_only=True)
    changed(state)
    torch.save(state, checkpoint)
    with pytest.raises(ConfigError, match=message):
        run_experiment(tiny_config(**keys | {"SOLVER.EPOCHS": 2}), resume=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"text"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(run, content):
    run.checkpoint.write_bytes(content)
    with pytest.raises(ConfigError, match=r"from checkpoint\.pth: .*damaged.* another OUTPUT_DIR"):
        run()


def test_one_flipped_bit_of_a_checkpoint_is_found(run):
    content = bytearray(run.checkpoint.read_bytes())
    weight = next(iter(torch.load(run.checkpoint, weights_only=True)["student"].values()))
    content[content.index(weight.numpy().tobytes())] ^= 4  # not in the padding between entries
    run.checkpoint.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot be resumed from checkpoint\.pth: .*damaged"):
        run(**{"SOLVER.EPOCHS": 3})


def test_a_file_that_holds_something_else_is_no_checkpoint(tmp_path):
    torch.save([1], tmp_path / "checkpoint.pth")
    with pytest.raises(ConfigError, match="it holds a list"):
        load_state(tmp_path / "checkpoint.pth", PARTS)


WIDER = {"STUDENT.NAME": "resnet8x4", "SOLVER.SCHEDULE": "multistep", "SOLVER.EPOCHS": 1}


@pytest.fixture
def adapted(pair_config, tmp_path):
    """``adapted(*methods)``: the configuration of a student that is wider than its teacher."""

    def config(name, methods, **keys):
        chosen = {"DISTILL.METHODS": methods, "DISTILL.WARMUP": 0.0, **WIDER, **keys}
        return pair_config("ce", name, **chosen)

    return config


def into_losses(state):
    """As states were written in which each loss has its adapters."""
    for name, value in state.pop("adapters").items():
        tap, _, kind = name.rpartition(".")
        state["losses"][f"1.adapters.{tap}.0.{kind}"] = value


def test_adapters_saved_in_a_loss_are_gone_on_with(adapted, tmp_path, assert_same_run):
    for name in ("whole", "parts"):
        run_experiment(adapted(name, "[CE, PKD]"))
    checkpoint = tmp_path / "parts" / "checkpoint.pth"
    state = torch.load(checkpoint, weights_only=True)
    assert list(state["adapters"]) == ["last.weight", "last.bias"]
    into_losses(state)
    torch.save(state, checkpoint)
    for name in ("whole", "parts"):
        run_experiment(adapted(name, "[CE, PKD]", **{"SOLVER.EPOCHS": 2}), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_adapters_saved_beside_other_parameters_of_losses_are_refused(adapted, tmp_path):
    run_experiment(adapted("run", "[CE, PKD, VID]"))
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    state = torch.load(checkpoint, weights_only=True)
    into_losses(state)
    torch.save(state, checkpoint)
    message = r"its losses hold .*adapters .*\(1\.adapters\.last\.0\.w.*outside"
    with pytest.raises(ConfigError, match=message):
        run_experiment(adapted("run", "[CE, PKD, VID]", **{"SOLVER.EPOCHS": 2}), resume=True)
