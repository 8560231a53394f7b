from __future__ import annotations

import pytest
import torch

from classification.config import ConfigError
from classification.data import ImageSet
from classification.teacher import check_teacher, teacher_run


@pytest.fixture
def images():
    return ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.arange(2), ("a", "b"))


def test_a_teacher_without_weights_or_training_is_refused(tiny_config):
    cfg = tiny_config(**{"TEACHER.TRAIN": False})
    with pytest.raises(ConfigError, match=r"'resnet8' has no weights; .* TEACHER.TRAIN True"):
        check_teacher(cfg)
    check_teacher(tiny_config(**{"TEACHER.TRAIN": False, "TEACHER.WEIGHTS": "file.pth"}))
    check_teacher(tiny_config(**{"TEACHER.TRAIN": False, "TEACHER.NAME": ""}))


def test_the_teacher_learns_by_cross_entropy_from_its_own_settings(tiny_config, images):
    cfg = tiny_config("kd", SEED=3, **{"TEACHER.SEED": 5, "TEACHER.PIXEL_MEAN": "[0.1, 0.2, 0.3]"})
    run, weights = teacher_run(cfg, images)
    assert (run.SEED, run.SOLVER.EPOCHS, run.TEACHER.NAME) == (5, 1, "")
    assert (run.DISTILL.METHODS, run.DISTILL.CE.WEIGHT) == (["CE"], 1.0)
    assert (run.STUDENT.NAME, run.STUDENT.PIXEL_MEAN) == ("resnet8", [0.1, 0.2, 0.3])
    assert str(weights) == f"{run.OUTPUT_DIR}.pth"


@pytest.mark.parametrize(
    "key", ["SEED", "LOG_EVERY", "SOLVER.EPOCHS", "STUDENT.PIXEL_MEAN", "DISTILL.KD.WEIGHT"]
)
def test_what_concerns_the_student_alone_leaves_the_teacher_as_it_is(tiny_config, images, key):
    value = "[0.1, 0.1, 0.1]" if "MEAN" in key else 9
    assert (
        teacher_run(tiny_config("kd", **{key: value}), images)[1]
        == (teacher_run(tiny_config(), images)[1])
    )


@pytest.mark.parametrize(
    "key", ["TEACHER.SEED", "TEACHER.EPOCHS", "SOLVER.BASE_LR", "DATA.CROP_PADDING"]
)
def test_what_determines_the_teacher_makes_another_one(tiny_config, images, key):
    ours = teacher_run(tiny_config(), images)[1]
    assert teacher_run(tiny_config(**{key: 9}), images)[1] != ours
    other = ImageSet(images.images + 1, images.labels, images.classes)
    assert teacher_run(tiny_config(), other)[1] != ours
