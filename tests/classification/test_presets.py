"""The settings of the shipped pairs and methods are those of the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from classification.config import (
    changed_keys,
    load_config,
)
from pcka.engine.config import flatten

CONFIGS = Path(__file__).parents[2] / "configs" / "classification"


def preset(pair, method, folder="cifar100"):
    return load_config(CONFIGS / folder / f"{pair}.yaml", method=method)


def test_the_published_presets():
    rcka = preset("resnet56_resnet20", "rcka")
    assert rcka.DISTILL.METHODS == ["CE", "RCKA"]
    assert rcka.DISTILL.CE.WEIGHT == 1
    assert rcka.DISTILL.RCKA.STAGES == ["last"]
    assert rcka.DISTILL.RCKA.FEATURE_WEIGHTS == [10]
    assert rcka.DISTILL.RCKA.INTRA_WEIGHT == rcka.DISTILL.RCKA.INTER_WEIGHT == 15
    assert rcka.DISTILL.RCKA.CENTER and not rcka.DISTILL.RCKA.ROW_NORMALIZE
    theirs = preset("resnet56_resnet20", "rcka_uncentered")
    assert changed_keys(rcka, theirs) == ["DISTILL.RCKA.CENTER", "DISTILL.RCKA.ROW_NORMALIZE"]
    short = preset("resnet56_resnet20", "rcka_short").DISTILL.RCKA
    assert [pytest.approx(10 / 15, abs=0.05)] == short.FEATURE_WEIGHTS
    assert short.INTRA_WEIGHT == short.INTER_WEIGHT == 1
    best = preset("resnet56_resnet20", "dist_fitnet_fcka").DISTILL
    assert best.METHODS == ["CE", "DIST", "FITNET", "FCKA"]
    assert (best.CE.WEIGHT, best.DIST.WEIGHT, best.DIST.TEMPERATURE) == (1, 2, 4)
    assert (best.FITNET.STAGES, best.FITNET.WEIGHTS) == (["last"], [10])
    assert (best.FCKA.STAGES, best.FCKA.WEIGHTS) == (["last"], [10])
    shipped = preset("resnet56_resnet20", "kd_pkd_fcka").DISTILL
    assert shipped.METHODS == ["CE", "KD", "PKD", "FCKA"]
    assert (shipped.CE.WEIGHT, shipped.KD.WEIGHT) == (0.1, 0.9)
    assert (shipped.PKD.STAGES, shipped.PKD.WEIGHTS) == (["last"], [30])
    assert (shipped.FCKA.STAGES, shipped.FCKA.WEIGHTS) == (["last"], [10])
    mixed = preset("resnet56_resnet20", "kd_fcka")
    assert mixed.DISTILL.METHODS == ["CE", "KD", "FCKA"]
    assert (mixed.DISTILL.CE.WEIGHT, mixed.DISTILL.KD.WEIGHT) == (0.1, 0.9)
    assert mixed.DISTILL.FCKA.STAGES == ["all"]
    assert mixed.DISTILL.FCKA.WEIGHTS == [3]
    assert mixed.SOLVER.MILESTONES == [150, 180, 210]
    both = preset("resnet56_resnet20", "kd_rcka")
    assert both.DISTILL.METHODS == ["CE", "KD", "RCKA"]
    assert (both.DISTILL.CE.WEIGHT, both.DISTILL.KD.WEIGHT) == (0.1, 0.9)
    assert both.DISTILL.RCKA == rcka.DISTILL.RCKA


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("kd", "KD.TEMPERATURE", 4),
        ("fitnet", "FITNET.WEIGHTS", [100]),
        ("at", "AT.WEIGHTS", [1000]),
        ("sp", "SP.WEIGHTS", [3000]),
        ("nst", "NST.WEIGHTS", [50]),
        ("kdsvd", "KDSVD.WEIGHT", 1),
        ("cc", "CC.WEIGHTS", [0.02]),
        ("rkd", "RKD.WEIGHTS", [1]),
        ("rkd", "RKD.DISTANCE_WEIGHT", 25),
        ("rkd", "RKD.ANGLE_WEIGHT", 50),
        ("pkt", "PKT.WEIGHTS", [30000]),
        ("vid", "VID.WEIGHTS", [1]),
        ("crd", "CRD.WEIGHT", 0.8),
        ("crd", "CRD.NEGATIVES", 16384),
        ("reviewkd", "REVIEWKD.WEIGHT", 5),
        ("dkd", "DKD.ALPHA", 1),
        ("dkd", "DKD.BETA", 8),
        ("dkd", "DKD.TEMPERATURE", 4),
        ("dist", "DIST.WEIGHT", 2),
        ("dist", "DIST.TEMPERATURE", 4),
        ("nkd", "NKD.GAMMA", 1.5),
        ("nkd", "NKD.TEMPERATURE", 1),
    ],
)
def test_the_methods_have_the_weights_of_the_field(method, key, value):
    cfg = preset("resnet32x4_resnet8x4", method)  # a pair with no weights of its own for these
    assert flatten(cfg.DISTILL)[key] == value


@pytest.mark.parametrize("method", ["dkd", "ikl", "reviewkd"])
def test_the_methods_that_warm_up_do_so_for_20_of_240_epochs(method):
    cfg = preset("resnet32x4_resnet8x4", method)
    assert pytest.approx(20, abs=0.01) == cfg.DISTILL.WARMUP * cfg.SOLVER.EPOCHS
    assert preset("resnet32x4_resnet8x4", "kd").DISTILL.WARMUP == 0


# Teacher's accuracy, student's rate, beta of DKD, weight of ReviewKD, alpha and beta of IKL.
PAIRS = {
    "resnet56_resnet20": (72.34, 0.05, 2, 0.6, 1, 4),
    "resnet110_resnet20": (74.31, 0.05, 2, None, None, None),
    "resnet110_resnet32": (74.31, 0.05, 2, 1, 1, 12),
    "resnet32x4_resnet8x4": (79.42, 0.05, 8, 5, 1, 8),
    "resnet32x4_ShuffleV1": (79.42, 0.01, 8, 5, 1, 8),
    "resnet32x4_ShuffleV2": (79.42, 0.01, 8, 8, 3, 12),
    "wrn_40_2_wrn_16_2": (75.61, 0.05, 6, 5, 3, 12),
    "wrn_40_2_wrn_40_1": (75.61, 0.05, 6, 5, 1, 8),
    "wrn_40_2_ShuffleV1": (75.61, 0.01, 8, 5, 1, 4),
    "vgg13_vgg8": (74.64, 0.05, 6, 5, 1, 12),
    "vgg13_MobileNetV2": (74.64, 0.01, 6, 5, 4, 12),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_pairs_of_the_field_have_its_settings(pair):
    assert {path.stem for path in CONFIGS.glob("cifar100/*.yaml")} - {"base"} == PAIRS.keys()
    accuracy, rate, dkd_beta, review, ikl_alpha, ikl_beta = PAIRS[pair]
    cfg = preset(pair, "dkd")
    assert (accuracy, rate) == (cfg.TEACHER.ACCURACY, cfg.SOLVER.BASE_LR)
    assert f"{cfg.TEACHER.NAME}_{cfg.STUDENT.NAME}" == pair
    assert dkd_beta == cfg.DISTILL.DKD.BETA
    if review is not None:
        assert review == preset(pair, "reviewkd").DISTILL.REVIEWKD.WEIGHT
        ikl = preset(pair, "ikl").DISTILL.IKL
        assert (ikl_alpha, ikl_beta) == (ikl.ALPHA, ikl.BETA)


def test_imagenet_has_its_own_temperatures_and_weights():
    kd = preset("resnet34_resnet18", "kd", "imagenet").DISTILL
    assert (kd.KD.TEMPERATURE, kd.KD.WEIGHT, kd.CE.WEIGHT) == (1, 0.5, 0.5)
    for pair, beta, review in (("resnet34_resnet18", 0.5, 1), ("resnet50_mobilenetv1", 2, 8)):
        dkd = preset(pair, "dkd", "imagenet").DISTILL.DKD
        assert (1, beta) == (dkd.TEMPERATURE, dkd.BETA)
        assert review == preset(pair, "reviewkd", "imagenet").DISTILL.REVIEWKD.WEIGHT
    assert preset("resnet34_resnet18", "dist", "imagenet").DISTILL.DIST.TEMPERATURE == 1
    for method in ("dkd", "reviewkd"):  # one epoch
        assert preset("resnet34_resnet18", method, "imagenet").DISTILL.WARMUP == 0.01
    assert preset("resnet50_mobilenetv1", "ofd", "imagenet").DISTILL.OFD.WEIGHT == 1e-4


@pytest.mark.parametrize("method", ["kd_fcka", "kd_rcka"])
def test_sums_with_kd_have_the_kd_of_their_data_set(method):
    for data, pair in (("imagenet", "resnet34_resnet18"), ("cifar100", "resnet110_resnet20")):
        kd, summed = (preset(pair, name, data).DISTILL for name in ("kd", method))
        assert (kd.KD, kd.CE) == (summed.KD, summed.CE)
        assert [*kd.METHODS, method[3:].upper()] == summed.METHODS
    other = preset("resnet110_resnet20", method).DISTILL
    assert summed[method[3:].upper()] == other[method[3:].upper()]
