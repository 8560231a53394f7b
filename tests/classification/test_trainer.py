from __future__ import annotations

import json

import pytest
import torch

from classification.lessons import _shared_observer
from classification.run import check_run, run_experiment
from classification.sweep import run_side_by_side
from classification.trainer import Trainer
from pcka.analysis.gradients import term_gradients
from pcka.distiller import Distiller
from pcka.engine.command import TrainingFailedError
from pcka.engine.config import ConfigError


def test_a_student_broken_by_the_last_step_of_an_epoch_is_not_saved(
    tiny_config, tmp_path, monkeypatch
):
    step = Trainer.step

    def breaking(self, inputs, number):
        step(self, inputs, number)  # of finite losses
        if self.epoch == 1:
            self.distiller.student.conv1.weight.data.fill_(float("inf"))

    monkeypatch.setattr(Trainer, "step", breaking)
    cfg = tiny_config(**{"TEACHER.NAME": "", "SOLVER.BATCH_SIZE": 40})  # a single step an epoch
    expected = (
        r"epoch 2 is not finite at the last step \(student.conv1.weight\), .*loss_ce=\d.*epoch 1"
    )
    with pytest.raises(TrainingFailedError, match=expected):
        run_experiment(cfg)
    state = torch.load(tmp_path / "run" / "model_last.pth", weights_only=True)
    assert all(value.isfinite().all() for value in state.values())


def test_teacher_and_student_see_their_own_pixel_statistics(tiny_config, monkeypatch):
    seen = {}

    def recording_observer(*arguments):
        observe = _shared_observer(*arguments)

        def record(images):
            seen.setdefault("teacher", images)
            return observe(images)

        return record

    def of_student(self, images, target, *rest, **others):
        if self.training:
            seen.setdefault("student", images)
        return forward(self, images, target, *rest, **others)

    cfg = tiny_config(
        "kd",
        **{"STUDENT.PIXEL_MEAN": "[0, 0, 0]", "STUDENT.PIXEL_STD": "[1, 1, 1]"}
        | {"TEACHER.PIXEL_MEAN": "[0.5, 0.5, 0.5]", "TEACHER.PIXEL_STD": "[0.25, 0.25, 0.25]"}
        | {"SOLVER.EPOCHS": 1, "SOLVER.BATCH_SIZE": 40, "CHANNELS_LAST": True},
    )
    run_experiment(cfg)  # trains the teacher
    forward = Distiller.forward
    monkeypatch.setattr(Distiller, "forward", of_student)
    monkeypatch.setattr("classification.lessons._shared_observer", recording_observer)
    run_experiment(cfg_in(cfg, "again"))
    torch.testing.assert_close(seen["teacher"], (seen["student"] - 0.5) / 0.25)
    assert 0.99 < seen["student"].max() <= 1
    for images in seen.values():
        assert images.is_contiguous(memory_format=torch.channels_last)


def cfg_in(cfg, name):
    other = cfg.clone()
    other.defrost()
    other.OUTPUT_DIR += name
    return other


def test_the_best_epoch_is_kept_apart_from_the_last(tiny_config, tmp_path, monkeypatch):
    top1 = iter([30.0, 50.0, 40.0])
    monkeypatch.setattr("classification.trainer.accuracy", lambda *_: {"top1": next(top1)})
    saved = []
    monkeypatch.setattr(
        "pcka.engine.run_folder.save_student", lambda _, path: saved.append(path.name)
    )
    result = run_experiment(tiny_config(**{"TEACHER.NAME": "", "SOLVER.EPOCHS": 3}))
    assert (result["last_accuracy"], result["best_accuracy"], result["best_epoch"]) == (40, 50, 2)
    assert saved == ["model_last.pth", "model_best.pth"] * 2 + ["model_last.pth"]
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [record["best_accuracy"] for record in records] == [30, 50, 50]


def gradient_figures(line):
    return {key: value for key, value in line.items() if key.startswith("gradient_")}


def test_gradients_are_looked_at_every_so_many_epochs_and_change_nothing(tiny_config, tmp_path):
    epochs = {"SOLVER.EPOCHS": 3, "OUTPUT_DIR": str(tmp_path / "plain")}
    plain = run_experiment(tiny_config("kd", **epochs))
    looked = {"GRADIENTS_EVERY": 2, "OUTPUT_DIR": str(tmp_path / "looked")}
    assert run_experiment(tiny_config("kd", **epochs | looked))["last_accuracy"] == pytest.approx(
        plain["last_accuracy"]
    )
    states = [torch.load(tmp_path / run / "model_last.pth") for run in ("plain", "looked")]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    first, second, last = map(json.loads, (tmp_path / "looked" / "metrics.jsonl").open())
    assert gradient_figures(first) == {}
    found = gradient_figures(second)
    assert gradient_figures(last).keys() == found.keys()
    assert found["gradient_share_ce"] + found["gradient_share_kd"] == pytest.approx(1)
    assert 0 < found["gradient_share_kd"] < 1
    assert found["gradient_cosine_ce"] == pytest.approx(1)
    assert -1 < found["gradient_cosine_kd"] < 1


def test_gradients_are_those_of_the_last_step_of_the_epoch(tiny_config, tmp_path, monkeypatch):
    sizes = []

    def update(self, inputs):
        before = [p.detach().clone() for p in self.distiller.student.parameters()]
        values = original(self, inputs)
        moved = zip(before, self.distiller.student.parameters(), strict=True)
        length = sum(((new - old) ** 2).sum().item() for old, new in moved) ** 0.5
        sizes.append((length, self.optimizer.param_groups[0]["lr"].item()))
        return values

    def total(terms, parameters, reference):
        parameters = list(parameters)
        found = term_gradients(terms, parameters, reference)
        gradients = torch.autograd.grad(terms[reference], parameters, retain_graph=True)
        norms.append(sum((g**2).sum().item() for g in gradients) ** 0.5)
        return found

    norms, original = [], Trainer.update
    monkeypatch.setattr(Trainer, "update", update)
    monkeypatch.setattr("pcka.analysis.gradients.term_gradients", total)
    plain_sgd = {"SOLVER.MOMENTUM": 0.0, "SOLVER.WEIGHT_DECAY": 0.0, "SOLVER.EPOCHS": 1}
    run_experiment(tiny_config(**plain_sgd, **{"TEACHER.NAME": "", "GRADIENTS_EVERY": 1}))
    assert len(sizes) > 1
    length, rate = sizes[-1]
    assert length == pytest.approx(rate * norms[0], rel=1e-3)
    assert len(norms) == 1


def test_without_cross_entropy_there_are_shares_and_no_cosines(tiny_config, tmp_path):
    keys = {"DISTILL.METHODS": "[KD]", "GRADIENTS_EVERY": 1, "SOLVER.EPOCHS": 1}
    run_experiment(tiny_config("kd", **keys))
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
    assert gradient_figures(line) == {"gradient_share_kd": 1.0}


def test_side_by_side_each_student_has_the_gradients_that_it_has_alone(tiny_config, tmp_path):
    names = ("kd", "ce")
    for name in names:
        run_experiment(tiny_config(name, OUTPUT_DIR=str(tmp_path / name), GRADIENTS_EVERY=1))
    beside = [
        tiny_config(name, OUTPUT_DIR=str(tmp_path / f"{name}-beside"), GRADIENTS_EVERY=1)
        for name in names
    ]
    run_side_by_side(beside)
    for name in names:
        alone, other = (
            [
                gradient_figures(json.loads(line))
                for line in (tmp_path / run / "metrics.jsonl").open()
            ]
            for run in (name, f"{name}-beside")
        )
        assert alone == other
        assert all(alone)


def test_terms_relative_to_cross_entropy_have_the_size_of_their_weights(tiny_config, tmp_path):
    run_experiment(tiny_config("kd_fcka", "relative", **{"DISTILL.RELATIVE": True}))
    lines = (tmp_path / "relative" / "metrics.jsonl").read_text().splitlines()
    means, weights = json.loads(lines[0]), {"ce": 0.1, "kd": 0.9, "fcka_stage1": 3.0}
    for name, weight in weights.items():
        assert means[f"loss_{name}"] == pytest.approx(weight * means["loss_ce"] / 0.1, rel=1e-4)


@pytest.mark.parametrize("method", ["vid", "itrd"])
def test_a_loss_that_can_be_negative_has_no_size_relative_to_cross_entropy(tiny_config, method):
    cfg = tiny_config(method, **{"DISTILL.RELATIVE": True, "TEACHER.TRAIN": True})
    name = method.upper()
    with pytest.raises(
        ConfigError, match=rf"METHODS: {name} can be negative, so that DISTILL\.REL"
    ):
        check_run(cfg)
