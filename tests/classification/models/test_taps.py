from __future__ import annotations

import pytest
import torch
from torch import nn

from classification.models import create_model
from classification.models.taps import (
    loss_context,
    model_taps,
    read_taps,
    unlike_signs,
)
from classification.run import check_losses, losses_of, untrained_pair
from pcka.engine.config import ConfigError
from pcka.engine.distill import numbered_stages

TAPS = {
    name: (f"student.{name}", f"teacher.{name}")
    for stage in ("stage0", "stage1", "stage2", "stage3", "last")
    for name in (stage, f"{stage}_preact")
} | {"pooled": ("student.pooled", "teacher.pooled")}


def model(*stages, preact=(), pooled=""):
    module = nn.Module()
    module.stage_names, module.preactivation_names, module.pooled_name = stages, preact, pooled
    return module


def test_stages_meet_by_number_where_both_have_as_many():
    taps = model_taps(model("relu", "a", "b"), model("stem", "x", "y"), [])
    assert taps == {
        "stage0": ("relu", "stem"),
        "stage1": ("a", "x"),
        "stage2": ("b", "y"),
        "last": ("b", "y"),
    }


def test_stages_meet_at_the_last_one_where_the_numbers_differ():
    few, many = ("relu", "a", "b"), ("stem", "w", "x", "y", "z")
    assert model_taps(model(*few), model(*many), []) == {
        "stage0": ("relu", "x"),
        "stage1": ("a", "y"),
        "stage2": ("b", "z"),
        "last": ("b", "z"),
    }
    assert model_taps(model(*many), model(*few), []) == {
        "stage2": ("x", "relu"),
        "stage3": ("y", "a"),
        "stage4": ("z", "b"),
        "last": ("z", "b"),
    }


def test_features_before_the_activation_and_pooled_ones_are_tapped_where_both_have_them():
    student = model("s0", "s1", preact=("p0", "p1"), pooled="fc:input")
    teacher = model("t0", "t1", preact=("q0", "q1"), pooled="head:input")
    assert model_taps(student, teacher, []) == {
        "stage0": ("s0", "t0"),
        "stage1": ("s1", "t1"),
        "last": ("s1", "t1"),
        "stage0_preact": ("p0", "q0"),
        "stage1_preact": ("p1", "q1"),
        "last_preact": ("p1", "q1"),
        "pooled": ("fc:input", "head:input"),
    }
    assert model_taps(student, model(), []) == model_taps(model(), teacher, []) == {}


def test_taps_of_the_configuration_come_beside_the_models_own_or_in_their_place():
    extra = [["neck", "a.b", "x.y"], ["last", "mine", "theirs"]]
    taps = model_taps(model("s0", "s1"), model("t0", "t1"), extra)
    assert taps["neck"] == ("a.b", "x.y")
    assert taps["last"] == ("mine", "theirs")
    assert taps["stage1"] == ("s1", "t1")


@pytest.mark.parametrize("entry", ["neck", ["neck", "a"], ["neck", "a", "b", "c"]])
def test_a_tap_that_is_no_triple_is_refused(entry):
    with pytest.raises(ConfigError, match=r"DISTILL.TAPS: expected \[name, path in the student"):
        model_taps(model("s0"), model("t0"), [entry])


def test_two_taps_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"DISTILL.TAPS: 'neck' names two taps; give each one"):
        model_taps(model("s0"), model("t0"), [["neck", "a", "b"], ["neck", "a", "c"]])


def test_losses_are_built_with_the_values_of_their_sections(tiny_config):
    cfg = tiny_config("kd_fcka", **{"DISTILL.KD.TEMPERATURE": 2, "DISTILL.FCKA.STAGES": "[stage2]"})
    ce, kd, fcka = losses_of(cfg, TAPS)
    assert (ce.weight, kd.weight, kd.temperature) == (0.1, 0.9, 2)
    assert fcka.taps == ("stage2",)
    assert list(fcka.weights) == [3.0]


def test_a_model_that_names_no_stages_has_those_that_a_dry_run_finds(tiny_config):
    keys = {"STUDENT.NAME": "torchvision/shufflenet_v2_x0_5", "TEACHER.NAME": "resnet8"}
    cfg = tiny_config("rcka", **keys)
    check_losses(cfg)
    taps = model_taps(*untrained_pair(cfg), cfg.DISTILL.TAPS)
    assert {name: taps[name] for name in numbered_stages(taps)} == {
        "stage1": ("maxpool", "relu"),
        "stage2": ("stage2", "layer1"),
        "stage3": ("stage3", "layer2"),
        "stage4": ("conv5", "layer3"),
    }


def test_a_loss_that_needs_a_teacher_is_refused_without_one(tiny_config):
    with pytest.raises(ValueError, match=r"RCKA needs a teacher, but TEACHER.NAME is empty"):
        losses_of(tiny_config("rcka", **{"TEACHER.NAME": ""}), TAPS)


@pytest.mark.parametrize(
    "keys",
    [
        {"DISTILL.METHODS": "[FGD]", "DISTILL.FGD.STAGES": "[stage3]"},
        {"DISTILL.METHODS": "[CROSSKD]"},
        {"DISTILL.METHODS": "[ROIKD]"},
        {
            "DISTILL.METHODS": "[PCKA]",
            "DISTILL.PCKA.STAGES": "[stage3]",
            "DISTILL.PCKA.BACKGROUND": 0.5,
        },
    ],
)
def test_a_loss_of_detectors_is_refused(tiny_config, keys):
    with pytest.raises(ValueError, match=r"METHODS: \w+ is for detectors or segmenters: it"):
        losses_of(tiny_config("rcka", **keys), TAPS)


def test_losses_are_checked_on_the_models_that_the_configuration_names(tiny_config):
    check_losses(tiny_config("ce", **{"TEACHER.NAME": ""}))
    taps = {"DISTILL.TAPS": "[[neck, layer2, layer1]]", "DISTILL.FITNET.STAGES": "[neck]"}
    check_losses(tiny_config("fitnet", **taps))
    with pytest.raises(
        ConfigError, match=r"stage9 is not tapped; available: .*; train.py --show-t"
    ):
        check_losses(tiny_config("fitnet", **{"DISTILL.FITNET.STAGES": "[stage9]"}))


@pytest.mark.parametrize("role", ["STUDENT", "TEACHER"])
def test_a_model_that_nobody_knows_is_named_with_its_key(tiny_config, role):
    with pytest.raises(ConfigError, match=rf"^{role}\.NAME: there is no model 'resnet7'; did"):
        check_losses(tiny_config("kd", **{f"{role}.NAME": "resnet7"}))


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return create_model("resnet20", 10)


def test_the_context_has_labels_classifier_and_the_norms_by_tap(teacher):
    student = create_model("resnet8", 10)
    taps = model_taps(student, teacher, [["mine", "layer1", "layer1"]])
    norms = {
        path: (torch.full((3,), float(i)), torch.zeros(3))
        for i, path in enumerate(teacher.preactivation_norms)
    }
    labels = torch.arange(4)
    context = loss_context(teacher, norms, taps, labels)
    assert context.train_labels is labels
    assert context.teacher_classifier is teacher.get_submodule(teacher.classifier_name)
    # Stage after stage; the last stage has its norm under both of its names.
    stages = [f"stage{i}_preact" for i in range(len(teacher.preactivation_norms))]
    assert context.teacher_norms.keys() == {*stages, "last_preact"}
    for i, name in enumerate(stages):
        assert context.teacher_norms[name][0][0] == i
    assert context.teacher_norms["last_preact"] is context.teacher_norms[stages[-1]]


def test_the_norms_follow_the_teachers_stages_where_the_numbers_differ(teacher):
    student = model(*"ab", preact=("a:input", "b:input"))
    taps = model_taps(student, teacher, [])
    norms = {path: (path, path) for path in teacher.preactivation_norms}
    context = loss_context(teacher, norms, taps, torch.zeros(0))
    *_, before, last = teacher.preactivation_norms
    assert context.teacher_norms == {
        "stage0_preact": (before, before),
        "stage1_preact": (last, last),
        "last_preact": (last, last),
    }


def test_a_stage_without_a_norm_and_a_model_without_a_classifier_are_left_out(teacher):
    taps = model_taps(create_model("resnet8", 10), teacher, [])
    teacher.classifier_name = ""
    teacher.preactivation_norms = ("", *teacher.preactivation_norms[1:])
    norms = {path: (path, path) for path in teacher.preactivation_norms if path}
    context = loss_context(teacher, norms, taps, torch.zeros(0))
    assert context.teacher_classifier is None
    assert "stage0_preact" not in context.teacher_norms
    assert "stage1_preact" in context.teacher_norms


class Stages(nn.Module):
    """Two convolutions; the activation behind the second one is a function, or a module."""

    def __init__(self, *, own_activations: bool) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)
        self.last = nn.ReLU() if own_activations else nn.Identity()

    def forward(self, x):
        return self.last(self.second(self.relu(self.first(x)))).relu().mean((2, 3))


def test_a_tap_before_an_activation_is_told_from_one_behind_it():
    torch.manual_seed(0)
    paths = {"stage0": "relu", "stage1": "last"}
    before, behind = (read_taps(Stages(own_activations=own), paths, 16) for own in (False, True))
    assert [before[name].shape for name in paths] == ["4 x 14 x 14", "5 x 12 x 12"]
    assert unlike_signs(before, behind) == ["stage1: below zero in the student only"]
    assert unlike_signs(behind, before) == ["stage1: below zero in the teacher only"]
    assert unlike_signs(before, before) == unlike_signs(behind, behind) == []
