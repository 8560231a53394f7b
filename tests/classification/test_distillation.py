from __future__ import annotations

import pytest
from torch import nn

from classification.distillation import build_losses, stage_taps


def model(*stages):
    module = nn.Module()
    module.stage_names = stages
    return module


def test_stages_meet_by_number_where_both_have_as_many():
    taps = stage_taps(model("relu", "a", "b"), model("stem", "x", "y"))
    assert taps == {"stage0": ("relu", "stem"), "stage1": ("a", "x"), "stage2": ("b", "y")}


def test_stages_meet_at_the_last_one_where_the_numbers_differ():
    few, many = ("relu", "a", "b"), ("stem", "w", "x", "y", "z")
    assert stage_taps(model(*few), model(*many)) == {
        "stage0": ("relu", "x"),
        "stage1": ("a", "y"),
        "stage2": ("b", "z"),
    }
    assert stage_taps(model(*many), model(*few)) == {
        "stage2": ("x", "relu"),
        "stage3": ("y", "a"),
        "stage4": ("z", "b"),
    }


def test_losses_are_built_with_the_values_of_their_sections(tiny_config):
    cfg = tiny_config("kd_fcka", **{"DISTILL.KD.TEMPERATURE": 2, "DISTILL.FCKA.STAGES": "[stage2]"})
    cfg.defrost()
    cfg.DISTILL.FCKA.WEIGHTS = [7.0]
    ce, kd, fcka = build_losses(cfg)
    assert (ce.weight, kd.weight, kd.temperature) == (0.1, 0.9, 2)
    assert fcka.taps == ("stage2",)


def test_a_loss_that_needs_a_teacher_is_refused_without_one(tiny_config):
    with pytest.raises(ValueError, match=r"RCKA needs a teacher and TEACHER.NAME is empty"):
        build_losses(tiny_config("rcka", **{"TEACHER.NAME": ""}))


def test_values_that_a_loss_refuses_name_its_section(tiny_config):
    with pytest.raises(ValueError, match=r"^DISTILL.KD: "):
        build_losses(tiny_config("kd", **{"DISTILL.KD.TEMPERATURE": -1}))
