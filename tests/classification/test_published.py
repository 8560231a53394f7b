from __future__ import annotations

import pytest

from classification.config import CONFIGS, load_config, method_files
from classification.published import CIFAR100_TOP1, PAIRS, published_accuracy


def config(pair="resnet110_resnet20", *overrides, folder="cifar100"):
    return load_config(CONFIGS / folder / f"{pair}.yaml", overrides)


@pytest.mark.parametrize(
    ("pair", "method", "expected"),
    [
        ("resnet110_resnet20", "ce", 69.06),
        ("resnet110_resnet20", "rcka", 72.26),
        ("resnet110_resnet32", "rcka", 74.31),
        ("wrn_40_2_wrn_40_1", "kd", 73.54),
        ("wrn_40_2_wrn_16_2", "crd", 75.48),
        ("resnet32x4_resnet8x4", "dkd", 76.32),
        ("vgg13_vgg8", "fcka", 74.35),
        ("wrn_40_2_ShuffleV1", "reviewkd", 77.14),
        ("resnet32x4_ShuffleV1", "srrl", 75.66),
        ("vgg13_MobileNetV2", "at", 59.4),
        ("vgg13_MobileNetV2", "lcka", 69.37),
        ("resnet110_resnet20", "ofd", None),  # not in the paper's table
        ("resnet110_resnet20", "kd_fcka", None),
        ("resnet56_resnet20", "kd", None),
        ("resnet32x4_ShuffleV2", "kd", None),
    ],
)
def test_figures_are_those_of_the_pair_and_method(pair, method, expected):
    assert published_accuracy(config(pair), method) == expected


def test_every_pair_has_a_configuration_and_every_method_a_file():
    assert CIFAR100_TOP1.keys() <= method_files().keys()
    for teacher, student in PAIRS:
        cfg = config(f"{teacher}_{student}")
        assert (teacher, student) == (cfg.TEACHER.NAME, cfg.STUDENT.NAME)
    for figures in CIFAR100_TOP1.values():
        assert len(figures) == len(PAIRS)
        assert all(figure is None or 55 < figure < 80 for figure in figures)


@pytest.mark.parametrize(
    "overrides",
    [
        ("SOLVER.EPOCHS", "239"),
        ("SOLVER.BATCH_SIZE", "128"),
        ("DATA.TRAIN_IMAGES", "40000"),
        ("DATA.HOLDOUT", "5000"),
        ("DATA.NAME", "cifar10"),
        ("STUDENT.NAME", "resnet8"),
        ("TEACHER.NAME", ""),
    ],
)
def test_another_setting_has_no_published_figure(overrides):
    assert published_accuracy(config(), "kd") == 70.67
    assert published_accuracy(config("resnet110_resnet20", *overrides), "kd") is None
