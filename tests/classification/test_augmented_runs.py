"""Runs on augmented and mixed images: what is shown to whom, and what is the same again."""

from __future__ import annotations

import pytest
import torch

from classification.data import pixel_statistics
from classification.run import check_losses, prepare_trainers, run_experiment
from classification.sweep import run_side_by_side
from classification.trainer import Trainer
from pcka import losses
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import read_metrics

pytestmark = pytest.mark.usefixtures("without_plots")

AUGMENTED = {
    "DATA.RANDAUGMENT": [2, 9], "DATA.ERASING": 0.25, "DATA.MIXUP": 0.8, "DATA.CUTMIX": 1.0,
    "DISTILL.CE.LABEL_SMOOTHING": 0.1,
}  # fmt: skip


@pytest.fixture
def config(pair_config):
    """``config(method, name, KEY=value)``: a tiny run on augmented images."""
    return lambda method, name, **keys: pair_config(method, name, **AUGMENTED, **keys)


def test_student_and_teacher_see_the_same_mixed_images(config):
    (trainer,) = prepare_trainers([config("kd", "run")], torch.device("cpu"))
    inputs = next(trainer.inputs(trainer.batches()))
    (plain,) = prepare_trainers([config("kd", "run")], torch.device("cpu"))
    unmixed = next(plain.train_set.training_batches(plain.cfg, 0))
    assert torch.equal(inputs.indices, unmixed.indices)
    assert not torch.equal(inputs.images, unmixed.images)
    teacher = trainer.distiller.observe_teacher(
        pixel_statistics(trainer.cfg.TEACHER)(inputs.images)
    )
    assert torch.equal(inputs.teacher.logits, teacher.logits)
    assert inputs.labels.shape == (10, 10) and inputs.labels.dtype == torch.float32
    assert (inputs.labels.amax(1) < 1).any()


def test_cross_entropy_learns_the_smoothed_mixture(config):
    (trainer,) = prepare_trainers([config("kd", "run")], torch.device("cpu"))
    inputs = next(trainer.inputs(trainer.batches()))
    student = trainer.distiller.student.train()
    log_p = student(trainer._pixels(inputs.images)).log_softmax(1)
    expected = -((0.9 * inputs.labels + 0.01) * log_p).sum(1).mean()
    terms = trainer.distiller(
        trainer._pixels(inputs.images), inputs.labels, teacher_outputs=inputs.teacher
    )
    weight = trainer.cfg.DISTILL.CE.WEIGHT
    torch.testing.assert_close(terms["loss_ce"], weight * expected)


def test_a_run_goes_on_bit_for_bit(config, tmp_path, monkeypatch, assert_same_run):
    run_experiment(config("kd_fcka", "whole"))
    start_epoch = Trainer.start_epoch

    def stopping(self):
        if self.epoch == 1:
            raise KeyboardInterrupt
        start_epoch(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "start_epoch", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(config("kd_fcka", "broken"))
    run_experiment(config("kd_fcka", "broken"), resume=True)
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_side_by_side_each_learns_what_it_learns_alone(config, tmp_path, assert_same_run):
    methods = ("kd", "dkd", "nkd", "mgd")
    run_side_by_side([config(method, f"together/{method}") for method in methods])
    for method in methods:
        run_experiment(config(method, f"alone/{method}"))
        assert_same_run(tmp_path / "together" / method, tmp_path / "alone" / method)
    assert len(read_metrics(tmp_path / "alone" / "kd" / "metrics.jsonl")) == 2


def test_a_teacher_is_trained_on_augmented_images_too(tiny_config):
    result = run_experiment(tiny_config("kd", **AUGMENTED, **{"TEACHER.TRAIN": True}))
    assert result["epochs"] == 2


OF_CLASSIFIERS = {name for name in losses.names() if not losses.build(name).of_detectors}


@pytest.mark.parametrize("name", sorted(OF_CLASSIFIERS - {"CRD"}))
def test_every_other_loss_takes_mixed_images(tiny_config, name):
    check_losses(tiny_config(**{"DATA.MIXUP": 0.5, "DISTILL.METHODS": f"[{name}]"}))


@pytest.mark.parametrize("keys", [["MIXUP"], ["CUTMIX"], ["MIXUP", "CUTMIX"]])
def test_crd_on_mixed_images_is_refused_with_key_and_reason(tiny_config, keys):
    cfg = tiny_config("crd", **{f"DATA.{key}": 0.5 for key in keys})
    named = " and ".join(f"DATA.{key}" for key in keys)
    message = (
        rf"DISTILL.METHODS: CRD cannot learn from mixed images \({named}\): .* belongs to two;"
    )
    with pytest.raises(ConfigError, match=message):
        check_losses(cfg)


def test_a_loss_of_ones_own_that_needs_classes_is_refused_before_the_first_step(
    tiny_config, random_teacher, monkeypatch
):
    class OneClass(losses.KD):
        def compare(self, student, teacher, target):
            if target.dim() != 1:
                raise ValueError("target: OneClass needs classes (B,)")
            return super().compare(student, teacher, target)

    monkeypatch.setitem(losses.registry._REGISTERED, "ONE_CLASS", OneClass)
    keys = {"DATA.MIXUP": 0.5, "DISTILL.METHODS": "[ONE_CLASS]", "TEACHER.WEIGHTS": random_teacher}
    with pytest.raises(ConfigError, match=r"DISTILL: target: OneClass needs classes \(B,\)"):
        prepare_trainers([tiny_config(**keys)], torch.device("cpu"))
