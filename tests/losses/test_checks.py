from __future__ import annotations

import pytest
import torch

from pcka.losses import checks


def test_require_hands_the_value_over():
    assert checks.require(0, "target", "CE") == 0


def test_require_names_argument_and_loss():
    with pytest.raises(ValueError, match=r"target: CE needs it"):
        checks.require(None, "target", "CE")


@pytest.mark.parametrize("shapes", [((4, 3), (4, 5)), ((4, 3), (5, 3)), ((4, 3, 1), (4, 3, 1))])
def test_logits_need_one_shape(shapes):
    with pytest.raises(ValueError, match=r"logits of one shape \(B, P\)"):
        checks.check_logits(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4,), (4,))])
def test_features_need_the_same_samples(shapes):
    with pytest.raises(ValueError, match="same samples"):
        checks.check_samples(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.parametrize("check", [checks.check_logits, checks.check_samples])
def test_models_must_be_comparable(check):
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"teacher must be of a floating dtype, got torch\.int64"):
        check(x, x.long())
    with pytest.raises(ValueError, match="one device; got student on cpu and teacher on meta"):
        check(x, x.to("meta"))


def test_features_need_one_dtype():
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"one dtype; got student torch\.float32 and teacher"):
        checks.check_samples(x, x.half())


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        checks.check_temperature(temperature)


def test_levels_name_the_setting_of_another_length():
    with pytest.raises(ValueError, match=r"patch_sizes must hold one value for each of the 2"):
        checks.check_levels(("a", "b"), weights=(1, 1), patch_sizes=(16,))


def test_a_stage_is_named_once():
    with pytest.raises(ValueError, match="once"):
        checks.check_levels(("a", "a"), weights=(1, 1))
