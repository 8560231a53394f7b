"""Running statistics of batch norm that lag behind, and how they are mended."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from classification import evaluate, train
from classification.batch_norm import lagging, recalibrate, running_norms, set_momentum
from classification.config import load_config
from classification.data import ResidentSet
from classification.data.augmentation import augmented_batches
from classification.export import export_student
from classification.run import run_experiment
from classification.teacher import teacher_run
from pcka.engine.config import ConfigError

KEYS = {"DATA.CROP_PADDING": 0, "DATA.FLIP": False, "TEACHER.NAME": ""}


@pytest.fixture
def images():
    """Twenty noisy images of two classes, twelve of them of the first."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    return ResidentSet(pixels, (torch.arange(20) >= 12).long(), ("a", "b"))


def norm_and_logits():
    return nn.Sequential(nn.BatchNorm2d(3, momentum=0.001), nn.Flatten(), nn.Linear(48, 2))


def test_statistics_are_the_mean_over_batches_and_the_rest_stays(images, tiny_config):
    model = norm_and_logits().eval()
    weights = [parameter.clone() for parameter in model.parameters()]
    recalibrate(model, nn.Identity(), images, tiny_config(**KEYS), 20)
    whole = images.images.double() / 255
    torch.testing.assert_close(
        model[0].running_mean.double(), whole.mean((0, 2, 3)), atol=1e-6, rtol=0
    )
    batches = [batch.images for batch in images.training_batches(tiny_config(**KEYS), 0)]
    variance = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in batches]).mean(0)
    torch.testing.assert_close(model[0].running_var, variance)
    assert (model[0].momentum, model.training) == (0.001, False)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))


def test_as_few_batches_as_hold_the_images_are_read(images, tiny_config):
    model = norm_and_logits()
    recalibrate(model, nn.Identity(), images, tiny_config(**KEYS), 3)
    first = next(iter(images.training_batches(tiny_config(**KEYS), 0)))
    torch.testing.assert_close(model[0].running_mean, first.images.mean((0, 2, 3)))


def test_the_batches_are_augmented_as_in_training(images, tiny_config):
    """RandAugment, erasing and mixup change the means of their channels."""
    changes = {"DATA.RANDAUGMENT": [1, 9], "DATA.ERASING": 0.5, "DATA.MIXUP": 0.8}
    cfg = tiny_config(**KEYS, **changes, **{"DATA.IMAGE_SIZE": 4})
    model = norm_and_logits()
    recalibrate(model, nn.Identity(), images, cfg, 20)
    means = [batch.images.mean((0, 2, 3)) for batch in augmented_batches(images, cfg, 0)]
    torch.testing.assert_close(model[0].running_mean, torch.stack(means).mean(0))


def test_a_model_without_running_statistics_is_refused(images, tiny_config):
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten())
    with pytest.raises(ConfigError, match="--recalibrate-bn: the model has no batch norm"):
        recalibrate(model, nn.Identity(), images, tiny_config(**KEYS), 20)


def test_an_evaluation_at_chance_beside_a_falling_loss_is_told(images):
    (text,) = lagging(norm_and_logits(), images, 60.0, [2.0, 1.5])
    assert "at chance (60.00 %)" in text and "momentum 0.001 at '0'" in text
    assert "--recalibrate-bn" in text and "STUDENT.BN_MOMENTUM 0.1" in text


def test_a_momentum_that_a_model_has_already_is_not_advised(images):
    model = norm_and_logits()
    set_momentum(model, 0.1)
    (text,) = lagging(model, images, 60.0, [2.0, 1.5])
    assert "momentum 0.1 at '0'" in text and "STUDENT.BN_MOMENTUM" not in text


@pytest.mark.parametrize(
    ("top1", "losses"),
    [(67.0, [2.0, 1.5]), (60.0, [2.0, 1.99]), (60.0, [2.0]), (60.0, [2.0, float("nan")])],
)
def test_what_may_be_well_is_not(images, top1, losses):
    assert not list(lagging(norm_and_logits(), images, top1, losses))
    assert not list(lagging(nn.Flatten(), images, 60.0, [2.0, 1.5]))


def test_a_training_tells_it_once(tiny_config, monkeypatch, without_plots, caplog):
    monkeypatch.setattr("classification.trainer.accuracy", lambda *_: {"top1": 10.0})
    run_experiment(tiny_config(**KEYS, **{"SOLVER.EPOCHS": 4}))
    told = [text for text in caplog.messages if "the evaluation is at chance" in text]
    assert len(told) == 1


def test_the_momentum_is_a_key(tiny_config, without_plots):
    model = norm_and_logits()
    set_momentum(model, 0.3)
    assert [norm.momentum for norm in running_norms(model).values()] == [0.3]
    cfg = tiny_config(**KEYS, **{"STUDENT.BN_MOMENTUM": 1.0, "SOLVER.EPOCHS": 1})
    run_experiment(cfg)
    state = torch.load(f"{cfg.OUTPUT_DIR}/model_last.pth", weights_only=True)
    # The statistics of the last batch alone: no trace of the 0 and 1 that they begin with.
    assert all(state[name].abs().min() > 0 for name in state if name.endswith("bn1.running_mean"))


def test_a_teacher_is_trained_with_its_own(tiny_config):
    labels = torch.arange(20) % 2
    images = ResidentSet(torch.zeros(20, 3, 4, 4, dtype=torch.uint8), labels, ("a", "b"))
    plain, _ = teacher_run(tiny_config(), images)
    quick, _ = teacher_run(tiny_config(**{"TEACHER.BN_MOMENTUM": 0.3}), images)
    students, _ = teacher_run(tiny_config(**{"STUDENT.BN_MOMENTUM": 0.3}), images)
    assert quick.STUDENT.BN_MOMENTUM == 0.3
    assert quick.OUTPUT_DIR != plain.OUTPUT_DIR == students.OUTPUT_DIR


def test_an_evaluation_mends_them_and_writes_the_model(
    digits_config, tiny_overrides, tmp_path, without_plots, capsys
):
    words = tiny_overrides(
        **KEYS, **{"STUDENT.BN_MOMENTUM": 1e-4, "SOLVER.EPOCHS": 12, "EVAL_EVERY": 12}
    )
    words = ["--config-file", str(digits_config), *words]
    before = train.main(words)["last_accuracy"]
    weights = tmp_path / "run" / "model_last.pth"
    after = evaluate.main(["--weights", str(weights), "--recalibrate-bn", *words])["top1"]
    assert after > before + 10
    mended = weights.with_name("model_last_recalibrated.pth")
    assert evaluate.main(["--weights", str(mended), *words])["top1"] == after
    cfg = load_config(words[1], words[2:])
    exported = export_student(cfg, str(weights), tmp_path / "student.pth", recalibrated=2048)
    states = [torch.load(path, weights_only=True) for path in (mended, exported)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
