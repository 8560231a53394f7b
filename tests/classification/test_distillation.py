from __future__ import annotations

import pytest
import torch
from torch import nn

from classification.distillation import (
    build_losses,
    check_losses,
    loss_context,
    model_taps,
    numbered_stages,
)
from classification.models import create_model
from pcka.engine.config import ConfigError

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


def test_the_stages_by_number_alone_are_followed():
    names = ("stage0", "stage12", "stage1_preact", "last", "pooled", "stage")
    taps = dict.fromkeys(names, ("", ""))
    assert list(numbered_stages(taps)) == ["stage0", "stage12"]


def test_losses_are_built_with_the_values_of_their_sections(tiny_config):
    cfg = tiny_config("kd_fcka", **{"DISTILL.KD.TEMPERATURE": 2, "DISTILL.FCKA.STAGES": "[stage2]"})
    cfg.defrost()
    cfg.DISTILL.FCKA.WEIGHTS = [7.0]
    ce, kd, fcka = build_losses(cfg, TAPS)
    assert (ce.weight, kd.weight, kd.temperature) == (0.1, 0.9, 2)
    assert fcka.taps == ("stage2",)
    assert list(fcka.weights) == [7.0]


def test_all_stands_for_every_stage_but_the_stem_and_a_single_weight_for_each(tiny_config):
    (fcka,) = build_losses(
        tiny_config(
            **{"DISTILL.METHODS": "[FCKA]", "DISTILL.FCKA.STAGES": "[all]"}
            | {"DISTILL.FCKA.WEIGHTS": "[3]"}
        ),
        TAPS,
    )
    assert fcka.taps == ("stage1", "stage2", "stage3")
    assert list(fcka.weights) == [3, 3, 3]


def test_all_preact_stands_for_the_same_stages_before_their_activation(tiny_config):
    keys = {"DISTILL.METHODS": "[OFD]", "DISTILL.OFD.STAGES": "[all_preact, last_preact]"}
    (ofd,) = build_losses(tiny_config(**keys), TAPS)
    assert ofd.taps == ("stage1_preact", "stage2_preact", "stage3_preact", "last_preact")


def test_a_weight_of_each_stage_stays_as_it_is(tiny_config):
    keys = {"DISTILL.METHODS": "[RCKA]", "DISTILL.RCKA.STAGES": "[all]"}
    (rcka,) = build_losses(tiny_config(**keys, **{"DISTILL.RCKA.FEATURE_WEIGHTS": "[1,2,3]"}), TAPS)
    assert rcka.taps == ("stage1", "stage2", "stage3")
    assert list(rcka.feature_loss.weights) == [1, 2, 3]
    keys |= {"DISTILL.RCKA.FEATURE_WEIGHTS": "[1, 2]"}
    with pytest.raises(ConfigError, match=r"^DISTILL\.RCKA: .*weight"):
        build_losses(tiny_config(**keys), TAPS)


def test_a_patch_size_serves_all_stages(tiny_config):
    keys = {"DISTILL.METHODS": "[PATCHED]", "DISTILL.PATCHED.STAGES": "[all]"}
    keys |= {"DISTILL.PATCHED.PATCH_SIZES": "[4]", "DISTILL.PATCHED.WEIGHTS": "[2]"}
    (patched,) = build_losses(tiny_config(**keys), TAPS)
    assert list(patched.patch_sizes) == [4, 4, 4]


def test_a_stage_that_is_not_tapped_is_refused(tiny_config):
    keys = {"DISTILL.METHODS": "[CE, FCKA]", "DISTILL.FCKA.STAGES": "[stage4, neck]"}
    keys |= {"DISTILL.FCKA.WEIGHTS": "[1]"}
    with pytest.raises(
        ConfigError,
        match=r"DISTILL\.FCKA: stage4, neck is not tapped; there are stage0, .*DISTILL\.TAPS adds",
    ):
        build_losses(tiny_config(**keys), TAPS)
    taps = {**TAPS, "stage4": ("", ""), "neck": ("", "")}
    (_, fcka) = build_losses(tiny_config(**keys), taps)
    assert fcka.taps == ("stage4", "neck")


@pytest.mark.parametrize(
    ("method", "key", "wildcard"),
    [("at", "AT", "all"), ("kd_fcka", "FCKA", "all"), ("ofd", "OFD", "all_preact")],
)
def test_all_stages_of_models_without_any_are_refused(tiny_config, method, key, wildcard):
    expected = rf"DISTILL\.{key}\.STAGES: '{wildcard}' stands for .* there are none; .* pooled"
    with pytest.raises(ConfigError, match=expected):
        build_losses(tiny_config(method), {"pooled": ("fc:input", "fc:input")})


def test_a_loss_on_no_stage_at_all_is_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"DISTILL\.AT\.STAGES: expected one or more stages"):
        build_losses(tiny_config("at", **{"DISTILL.AT.STAGES": "[]"}), TAPS)


def test_taps_that_are_missing_are_proposed_and_would_do(tiny_config):
    keys = {"STUDENT.NAME": "torchvision/shufflenet_v2_x0_5", "TEACHER.NAME": "resnet8"}
    for method in ("at", "rcka"):
        with pytest.raises(ConfigError) as refused:
            check_losses(tiny_config(method, **keys))
        proposed = str(refused.value).rpartition('DISTILL.TAPS "')[2]
        assert "[last, conv5, layer3]" in proposed
        cfg = tiny_config(method, **keys, **{"DISTILL.TAPS": proposed.removesuffix('"')})
        check_losses(cfg)
    taps = model_taps(*(create_model(n, 2) for n in keys.values()), cfg.DISTILL.TAPS)
    assert numbered_stages(taps) == {
        "stage0": ("maxpool", "relu"),
        "stage1": ("stage2", "layer1"),
        "stage2": ("stage3", "layer2"),
        "stage3": ("conv5", "layer3"),
    }


def test_a_loss_that_needs_a_teacher_is_refused_without_one(tiny_config):
    with pytest.raises(ValueError, match=r"RCKA needs a teacher and TEACHER.NAME is empty"):
        build_losses(tiny_config("rcka", **{"TEACHER.NAME": ""}), TAPS)


def test_values_that_a_loss_refuses_name_its_section(tiny_config):
    with pytest.raises(ValueError, match=r"^DISTILL.KD: "):
        build_losses(tiny_config("kd", **{"DISTILL.KD.TEMPERATURE": -1}), TAPS)


def test_losses_are_checked_on_the_models_that_the_configuration_names(tiny_config):
    check_losses(tiny_config("ce", **{"TEACHER.NAME": ""}))
    taps = {"DISTILL.TAPS": "[[neck, layer2, layer1]]", "DISTILL.FITNET.STAGES": "[neck]"}
    check_losses(tiny_config("fitnet", **taps))
    # A model without known stages: what the losses read of it has to be given by hand.
    unknown = {"TEACHER.NAME": "torchvision/alexnet"}
    with pytest.raises(ConfigError, match=r"stage2 is not tapped; there are pooled, and"):
        check_losses(tiny_config("fitnet", **unknown))
    check_losses(tiny_config("kd", **unknown))


@pytest.mark.parametrize("role", ["STUDENT", "TEACHER"])
def test_a_model_that_nobody_knows_is_named_with_its_key(tiny_config, role):
    with pytest.raises(ConfigError, match=rf"^{role}\.NAME: expected .* got 'resnet7'; did you me"):
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
