from __future__ import annotations

import warnings

import pytest
import torch

from pcka.losses.numerics import DegenerateLevelWarning, leave_out_constant


@pytest.mark.parametrize(("samples", "center"), [(3, True), (2, False)])
def test_enough_samples_change_nothing(samples, center):
    loss = torch.tensor(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert leave_out_constant(loss, samples=samples, center=center, level="a") is loss


@pytest.mark.parametrize(("samples", "center"), [(2, True), (1, True), (1, False)])
def test_a_constant_alignment_is_an_attached_zero(samples, center):
    x = torch.tensor(0.3, requires_grad=True)
    with pytest.warns(DegenerateLevelWarning, match=rf"a: .* {samples} sample"):
        loss = leave_out_constant(x.square(), samples=samples, center=center, level="a")
    loss.backward()
    assert loss.item() == 0
    assert x.grad.item() == 0


def test_each_level_warns_once():
    with pytest.warns(DegenerateLevelWarning) as caught:
        for level in ("a", "b", "a", "b"):
            leave_out_constant(torch.tensor(0.3), samples=1, center=True, level=level)
    assert [str(w.message).split(":")[0] for w in caught] == ["a", "b"]
