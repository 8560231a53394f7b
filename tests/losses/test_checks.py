from __future__ import annotations

import pytest
import torch

from pcka.losses import checks


@pytest.mark.parametrize("shapes", [((4, 3), (4, 5)), ((4, 3), (5, 3)), ((4, 3, 1), (4, 3, 1))])
def test_logits_need_one_shape(shapes):
    with pytest.raises(ValueError, match=r"logits of one shape \(B, P\)"):
        checks.as_logits(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4,), (4,))])
def test_features_need_the_same_samples(shapes):
    with pytest.raises(ValueError, match="same samples"):
        checks.as_samples(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.parametrize("check", [checks.as_logits, checks.as_samples])
def test_models_must_be_comparable(check):
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"teacher must have a floating dtype, got torch\.int64"):
        check(x, x.long())
    with pytest.raises(ValueError, match="one device; got student on cpu and teacher on meta"):
        check(x, x.to("meta"))
    with pytest.raises(ValueError, match=r"teacher must be dense, got .*pass teacher\.to_dense"):
        check(x, x.to_sparse())
    with pytest.raises(ValueError, match=r"student must not be empty, got shape \(0, 3\)"):
        check(x[:0], x[:0])


def test_models_of_two_dtypes_meet_in_the_wider_one():
    x = torch.zeros(4, 3, requires_grad=True)
    dtypes = {
        (torch.float32, torch.float16): (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16): (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16): (torch.float32, torch.float32),
        (torch.float16, torch.float64): (torch.float64, torch.float64),
    }
    for (student, teacher), (shared, widened) in dtypes.items():
        for widen, expected in ((False, shared), (True, widened)):
            own, other = checks.as_samples(x.to(student), x.to(teacher), widen=widen)
            assert own.dtype == other.dtype == expected
            assert own.requires_grad and not other.requires_grad


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "4", None, True])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        checks.check_temperature(temperature)


@pytest.mark.parametrize("weight", [-1, -1e-9, float("nan"), float("inf"), "1", None, True])
def test_a_weight_is_a_finite_number_from_0_on(weight):
    with pytest.raises(ValueError, match="beta must be finite and at least 0"):
        checks.check_weights(alpha=0, beta=weight)


@pytest.mark.parametrize("count", [0, -3, 2.5, float("nan"), "1", None, True])
def test_a_count_is_an_integer_from_1_on(count):
    with pytest.raises(ValueError, match="k must be an integer of at least 1"):
        checks.check_counts(dim=1, k=count)


def test_a_setting_holds_one_value_for_each_stage_or_one_for_all():
    assert checks.for_each(("a", "b"), "weights", [1, 2]) == (1, 2)
    assert checks.for_each(("a", "b"), "weights", 3.0) == (3.0, 3.0)
    assert checks.for_each(("a", "b"), "weights", [3.0]) == (3.0, 3.0)
    for values in ((16, 16, 16), (), "16"):
        with pytest.raises(ValueError, match=r"patch_sizes must hold one value .* 2 stages a, b"):
            checks.for_each(("a", "b"), "patch_sizes", values)


def test_stages_are_names():
    assert checks.as_stages(["a", "b"]) == ("a", "b")
    with pytest.raises(ValueError, match=r"stages must be a list of names, got 'last'.*\['last'\]"):
        checks.as_stages("last")
    for stages, message in (
        ([], "stages is empty"),
        (["a", "a"], "once"),
        ([1, 2], r"stages must be names, got \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            checks.as_stages(stages)
