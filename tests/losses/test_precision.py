from __future__ import annotations

import itertools

import pytest
import torch

from pcka.losses import at_loss, ickd_loss, nst_loss, pkd_loss, rkd_loss, sp_loss
from pcka.losses.numerics import unit_length, without_autocast


@without_autocast
def product(student, teacher, *, factor=1.0):
    """A product."""
    return factor * student @ teacher


def test_autocast_is_off_inside_and_on_again_after(draw):
    x, y = draw(0, 4, 4).float(), draw(1, 4, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = product(x, y, factor=2.0)
        after = x @ y
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, 2 * x @ y, rtol=0, atol=0)
    assert after.dtype == torch.bfloat16


def test_the_function_keeps_its_name():
    assert (product.__name__, product.__doc__) == ("product", "A product.")


@pytest.mark.parametrize(
    ("loss", "scale"),
    [
        *itertools.product([at_loss, ickd_loss, nst_loss, sp_loss], [1e-8, 1e9]),
        *itertools.product([pkd_loss, rkd_loss], [1e9]),  # small features meet their epsilons
    ],
)
def test_losses_without_a_scale_have_none_in_float32_either(draw, loss, scale):
    """Norms of squares would overflow, and a loss of 0 would say that nothing is to be learned."""
    student, teacher = draw(0, 4, 3, 8, 8).float(), draw(1, 4, 3, 8, 8).float()
    student.requires_grad_()
    results = []
    for factor in (1.0, scale):
        value = loss(factor * student, factor * teacher)
        results.append((value, torch.autograd.grad(value, student)[0]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-7)
    assert results[1][0] > 0


def test_zeros_have_no_direction(draw):
    x = torch.stack([draw(0, 4), torch.zeros(4)]).requires_grad_()
    rows = unit_length(x, dim=1)
    torch.testing.assert_close(rows.norm(dim=1), torch.tensor([1.0, 0.0]).double())
    assert torch.autograd.grad(rows.sum(), x)[0].isfinite().all()
