"""Steps as CUDA graphs, on a GPU."""

from __future__ import annotations

import pytest
import torch

from classification import run as runs_of
from classification.config import method_files
from classification.models import create_model
from classification.run import run_experiment
from classification.sweep import run_side_by_side
from pcka.engine.random_state import seed_everything
from pcka.engine.run_folder import read_metrics
from pcka.losses import Loss, Term

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

NOT_CAPTURABLE = ("crd", "kdsvd", "vkd")
UNRECORDED = "kernel by kernel"


def losses(folder):
    """Every loss term of every epoch."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k.startswith("loss_")} for record in records]


MODERN = {
    "SOLVER.OPTIMIZER": "adamw", "SOLVER.BASE_LR": 0.002, "SOLVER.CLIP_GRADIENTS": 0.5,
    "SOLVER.EMA_DECAY": 0.9, "SOLVER.SCHEDULE": "onecycle", "SOLVER.WARMUP_EPOCHS": 0,
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, MODERN, {**MODERN, "SOLVER.ACCUMULATE": 5}])
def test_recorded_steps_train_as_plain_ones_do(pair_config, tmp_path, caplog, more):
    """The weights differ by a small part of the way that they have come."""
    runs = {"kd": 0, "fcka": 0, "ce": 1}
    for name, graph in (("plain", False), ("graph", True)):
        keys = {"DEVICE": "cuda", "CUDA_GRAPH": graph, "SOLVER.BATCH_SIZE": 4, **more}
        run_side_by_side(
            [pair_config(m, f"{name}/{m}", SEED=seed, **keys) for m, seed in runs.items()]
        )
    assert UNRECORDED not in caplog.text
    for method, seed in runs.items():
        seed_everything(seed)
        start = flat(create_model("resnet8", 10).state_dict())
        for file in ("model_last.pth", *(["model_ema.pth"] if more else [])):
            plain, graph = (
                flat(torch.load(tmp_path / name / method / file)) for name in ("plain", "graph")
            )
            assert (graph - plain).norm() < 0.1 * (plain - start).norm()


def test_a_run_by_adamw_with_an_average_goes_on(pair_config, tmp_path, caplog):
    keys = {**MODERN, "SOLVER.SCHEDULE": "multistep", "DISTILL.WARMUP": 0, "SOLVER.ACCUMULATE": 2}

    def config(name, epochs):
        return pair_config("kd", name, DEVICE="cuda", **keys, **{"SOLVER.EPOCHS": epochs})

    run_experiment(config("whole", 3))
    run_experiment(config("parts", 1))
    run_experiment(config("parts", 3), resume=True)
    assert UNRECORDED not in caplog.text
    for whole, parts in zip(losses(tmp_path / "whole"), losses(tmp_path / "parts"), strict=True):
        assert parts == pytest.approx(whole, rel=0.02)


def test_a_run_that_draws_random_masks_goes_on(pair_config, tmp_path, caplog):
    def config(name, epochs):
        keys = {"SOLVER.EPOCHS": epochs, "SOLVER.SCHEDULE": "multistep", "DISTILL.WARMUP": 0}
        return pair_config("mgd", name, DEVICE="cuda", AUTOCAST="bfloat16", **keys)

    run_experiment(config("whole", 3))
    run_experiment(config("parts", 1))
    run_experiment(config("parts", 3), resume=True)
    assert UNRECORDED not in caplog.text
    for whole, parts in zip(losses(tmp_path / "whole"), losses(tmp_path / "parts"), strict=True):
        assert parts == pytest.approx(whole, rel=0.02)


def test_a_run_from_a_teachers_outputs_on_disk_learns_what_it_learns_from_the_teacher(
    pair_config, tmp_path, monkeypatch
):
    keys = {"DEVICE": "cuda", "AUTOCAST": "bfloat16", "SOLVER.BATCH_SIZE": 4}
    run_experiment(pair_config("kd_fcka", "live", **keys))
    keys["TEACHER.OUTPUTS"] = tmp_path / "outputs"
    run_experiment(pair_config("kd_fcka", "kept", **keys))
    monkeypatch.setattr("classification.lessons.Lessons._answer", None)
    run_experiment(pair_config("kd_fcka", "disk", **keys))
    for name in ("kept", "disk"):
        for ours, live in zip(losses(tmp_path / name), losses(tmp_path / "live"), strict=True):
            assert ours == pytest.approx(live, rel=0.02)


def test_students_that_draw_are_not_recorded_side_by_side(pair_config, caplog):
    run_side_by_side([pair_config(m, m, DEVICE="cuda") for m in ("mgd", "ce")])
    assert f"{UNRECORDED}: it draws random numbers" in caplog.text


def flat(state):
    """All weights as one vector."""
    return torch.cat([value.double().flatten() for value in state.values()])


class Waits(Loss):
    """Reads a value at every step."""

    needs_teacher = False
    needs_target = True

    def terms(self, student, teacher, target):
        value = student.logits.square().mean() * target.float().mean().item()
        return {"loss_waits": Term(1.0, value)}


def test_a_recording_that_fails_leaves_no_trace(pair_config, tmp_path, caplog, monkeypatch):
    build = runs_of.losses_of
    monkeypatch.setattr(runs_of, "losses_of", lambda *a: [*build(*a), Waits()])
    for name, graph in (("plain", False), ("graph", True)):
        run_experiment(pair_config("ce", name, DEVICE="cuda", CUDA_GRAPH=graph))
    assert f"{UNRECORDED}: recording it failed" in caplog.text
    for plain, graph in zip(losses(tmp_path / "plain"), losses(tmp_path / "graph"), strict=True):
        assert graph == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("method", NOT_CAPTURABLE)
def test_what_cannot_be_recorded_trains_and_says_so(pair_config, method, caplog):
    run_experiment(pair_config(method, method, DEVICE="cuda"))
    assert f"{UNRECORDED}: {method.upper()} cannot be part of one" in caplog.text


@pytest.mark.parametrize("method", sorted(method_files().keys() - set(NOT_CAPTURABLE)))
def test_every_other_method_is_recorded(pair_config, method, caplog):
    keys = {"SOLVER.EPOCHS": 1, "DISTILL.WARMUP": 0, "DEVICE": "cuda", "AUTOCAST": "bfloat16"}
    result = run_experiment(pair_config(method, method, **keys))
    assert result["epochs"] == 1
    assert UNRECORDED not in caplog.text
