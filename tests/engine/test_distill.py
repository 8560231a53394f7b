from __future__ import annotations

import pytest
from fvcore.common.config import CfgNode

from pcka import losses
from pcka.engine.config import ConfigError
from pcka.engine.distill import (
    UntappedError,
    add_sections,
    build_losses,
    changed_settings,
    merge_settings,
    named_losses,
    numbered_stages,
    section_defaults,
)

TAPS = [
    name
    for stage in ("stage0", "stage1", "stage2", "stage3", "last")
    for name in (stage, f"{stage}_preact")
] + ["pooled"]


def config(**leaves):
    """A configuration with these keys below DISTILL."""
    cfg = CfgNode({"SEED": 0})
    cfg.DISTILL = CfgNode({"METHODS": ["CE"], "WARMUP": 0.0})
    keys = {f"DISTILL.{key.replace('__', '.')}": value for key, value in leaves.items()}
    merge_settings(cfg, keys, "here")
    return cfg


def built(taps=TAPS, **leaves):
    distill = config(**leaves).DISTILL
    return build_losses(distill.METHODS, distill, taps)


def test_a_loss_has_its_section_by_being_named():
    cfg = config(METHODS=["CE", "KD"], DIST__BETA=2)
    assert set(cfg.DISTILL) == {"METHODS", "WARMUP", "CE", "KD", "DIST"}
    assert {**section_defaults("DIST"), "BETA": 2.0} == cfg.DISTILL.DIST


def test_a_section_has_the_keywords_of_its_loss_with_their_defaults():
    for name in losses.names():
        section = section_defaults(name)
        assert [key.lower() for key in section] == list(losses.defaults(name))
        assert type(losses.build(name, **{k.lower(): v for k, v in section.items()}))


def test_a_section_that_is_there_stays_as_it_is():
    cfg = config(KD__WEIGHT=3)
    add_sections(cfg.DISTILL, ["KD", "NKD"], lambda name: {"WEIGHT": 7.0})
    assert (cfg.DISTILL.KD.WEIGHT, cfg.DISTILL.NKD) == (3, {"WEIGHT": 7.0})


def test_the_keys_of_losses_tell_which_are_named():
    keys = ["SEED", "DISTILL.METHODS", "DISTILL.KD.WEIGHT", "DISTILL.KD.BETA", "DISTILL.XY.Z"]
    assert named_losses(keys) == ["KD"]


def test_settings_of_a_loss_that_is_not_summed_do_not_count():
    for methods, expected in ((["CE"], {}), (["KD"], {"DISTILL.KD.WEIGHT": (1.0, 2.0)})):
        had, wanted = (config(METHODS=methods, KD__WEIGHT=weight) for weight in (1.0, 2.0))
        assert changed_settings(had, wanted) == expected
    assert list(changed_settings(config(), config(WARMUP=0.5))) == ["DISTILL.WARMUP"]


def test_one_value_for_all_stages_is_as_good_as_that_value_for_each():
    def changed(key, value, other):
        had, wanted = (config(METHODS=["AT"], **{f"AT__{key}": v}) for v in (value, other))
        return list(changed_settings(had, wanted))

    assert changed("WEIGHTS", [7.0], [7.0, 7.0]) == changed("WEIGHTS", 7.0, [7.0, 7.0]) == []
    assert changed("WEIGHTS", [7.0], [7.0, 2.0]) == ["DISTILL.AT.WEIGHTS"]
    assert changed("STAGES", ["last"], ["last", "last"]) == ["DISTILL.AT.STAGES"]


def test_an_unknown_key_is_refused_with_near_ones_of_all_losses():
    with pytest.raises(ConfigError, match=r"^here: unknown key 'DISTILL\.KD\.TAU'"):
        config(KD__TAU=4)
    with pytest.raises(ConfigError, match=r"unknown key 'DISTILL\.PKA\.PATCH_SIZES'.*PCKA\.PATCH"):
        config(PKA__PATCH_SIZES=4)


def test_a_single_value_may_stand_for_a_list_of_one_where_it_serves_all_stages():
    cfg = config(FCKA__WEIGHTS=3, PATCHED__PATCH_SIZES="4", RCKA__FEATURE_WEIGHTS="1e-1").DISTILL
    assert (cfg.FCKA.WEIGHTS, cfg.PATCHED.PATCH_SIZES) == ([3.0], [4])
    assert cfg.RCKA.FEATURE_WEIGHTS == [0.1]


@pytest.mark.parametrize("key", ["METHODS", "FCKA__STAGES", "PCKA__RELATIONS"])
def test_a_word_where_a_list_is_meant_is_refused(key):
    with pytest.raises(ConfigError, match="expects a list"):
        config(**{key: "last"})


def test_losses_are_built_with_the_values_of_their_sections():
    leaves = {"KD__TEMPERATURE": 2, "FCKA__STAGES": "[stage2]", "FCKA__WEIGHTS": [7]}
    ce, kd, fcka = built(METHODS=["CE", "KD", "FCKA"], CE__WEIGHT=0.1, **leaves)
    assert (ce.weight, kd.temperature) == (0.1, 2)
    assert (fcka.taps, list(fcka.weights)) == (("stage2",), [7.0])


def test_a_loss_without_a_section_has_its_own_defaults():
    (kd,) = build_losses(["KD"], {}, [])
    assert kd.temperature == losses.defaults("KD")["temperature"]


def test_all_stands_for_every_stage_but_the_stem_and_a_single_weight_for_each():
    (fcka,) = built(METHODS=["FCKA"], FCKA__STAGES=["all"], FCKA__WEIGHTS=[3])
    assert fcka.taps == ("stage1", "stage2", "stage3")
    assert list(fcka.weights) == [3, 3, 3]


def test_all_preact_stands_for_the_same_stages_before_their_activation():
    (ofd,) = built(METHODS=["OFD"], OFD__STAGES=["all_preact", "last_preact"])
    assert ofd.taps == ("stage1_preact", "stage2_preact", "stage3_preact", "last_preact")


def test_a_weight_of_each_stage_stays_as_it_is():
    leaves = {"METHODS": ["RCKA"], "RCKA__STAGES": ["all"]}
    (rcka,) = built(**leaves, RCKA__FEATURE_WEIGHTS=[1, 2, 3])
    assert rcka.taps == ("stage1", "stage2", "stage3")
    assert list(rcka.feature_loss.weights) == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"^DISTILL\.RCKA: .*weight"):
        built(**leaves, RCKA__FEATURE_WEIGHTS=[1, 2])


def test_a_patch_size_serves_all_stages_and_may_be_a_pair():
    leaves = {"METHODS": ["PATCHED"], "PATCHED__STAGES": ["all"], "PATCHED__WEIGHTS": 2}
    (patched,) = built(**leaves, PATCHED__PATCH_SIZES=[4])
    assert list(patched.patch_sizes) == [4, 4, 4]
    (patched,) = built(**leaves, PATCHED__PATCH_SIZES=[[4, 2]])
    assert list(patched.patch_sizes) == [(4, 2)] * 3


def test_no_stages_stand_for_those_that_the_trainer_offers():
    sections = {"FCKA": {"STAGES": [], "WEIGHTS": [3.0]}}
    (fcka,) = build_losses(["FCKA"], sections, ["p3", "p4"], default_stages=["p3", "p4"])
    assert (fcka.taps, list(fcka.weights)) == (("p3", "p4"), [3, 3])


def test_a_loss_on_no_stage_at_all_is_refused():
    with pytest.raises(ConfigError, match=r"DISTILL\.AT\.STAGES: expected one or more stages"):
        built(METHODS=["AT"], AT__STAGES=[])


def test_a_stage_that_is_not_tapped_is_refused():
    leaves = {"METHODS": ["CE", "FCKA"], "FCKA__STAGES": ["stage4", "neck"]}
    expected = (
        r"DISTILL\.FCKA: stage4, neck is not tapped; available: stage0, .*add more in DISTILL\.TAPS"
    )
    with pytest.raises(UntappedError, match=expected):
        built(**leaves)
    (_, fcka) = built([*TAPS, "stage4", "neck"], **leaves)
    assert fcka.taps == ("stage4", "neck")


def test_a_stage_that_is_not_tapped_is_told_before_the_number_of_its_settings():
    leaves = {"METHODS": ["PCKA"], "PCKA__STAGES": ["last", "neck"]}
    with pytest.raises(UntappedError, match=r"^DISTILL\.PCKA: neck is not tapped"):
        built(**leaves, PCKA__PATCH_SIZES=[4, 4, 2])


def test_the_key_that_adds_taps_is_the_trainers():
    with pytest.raises(
        UntappedError, match=r"last is not tapped; available: p3; add more in DISTILL.LEVEL"
    ):
        build_losses(["FCKA"], {}, ["p3"], taps_key="DISTILL.LEVELS")


@pytest.mark.parametrize(
    ("method", "wildcard"), [("AT", "all"), ("FCKA", "all"), ("OFD", "all_preact")]
)
def test_all_stages_of_models_without_any_are_refused(method, wildcard):
    expected = (
        rf"DISTILL\.{method}\.STAGES: '{wildcard}' stands for .* are none; available: .*pooled"
    )
    with pytest.raises(UntappedError, match=expected):
        built(["pooled"], METHODS=[method], **{f"{method}__STAGES": [wildcard]})


def test_a_loss_that_cannot_serve_is_refused_with_the_trainers_reason():
    def unfit(loss):
        return "needs logits, which a detector has not" if loss.needs_logits else None

    with pytest.raises(ConfigError, match=r"^DISTILL\.METHODS: KD needs logits, which"):
        build_losses(["KD"], {}, [], unfit=unfit)
    assert build_losses(["FCKA"], {}, ["last"], unfit=unfit)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["CE", "CE"], "expected each loss once"),
        (["CE", "RKCA"], "unknown loss 'RKCA'; near matches: .*RCKA"),
    ],
)
def test_methods_that_cannot_be_are_refused(methods, message):
    with pytest.raises(ConfigError, match=f"^DISTILL.METHODS: {message}"):
        build_losses(methods, {}, TAPS)


def test_values_that_a_loss_refuses_name_its_section():
    with pytest.raises(ConfigError, match=r"^DISTILL\.KD: "):
        built(METHODS=["KD"], KD__TEMPERATURE=-1)


def test_the_stages_by_number_alone_are_numbered():
    names = ("stage0", "stage12", "stage1_preact", "last", "pooled", "stage")
    assert numbered_stages(names) == ["stage0", "stage12"]
