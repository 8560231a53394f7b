from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch

from pcka import losses
from pcka.losses import (
    DegenerateLevelWarning,
    Outputs,
    at_loss,
    cc_neighbours_loss,
    dist_loss,
    ickd_loss,
    itrd_loss,
    kd_loss,
    nst_loss,
    pkd_loss,
    pkt_loss,
    rkd_loss,
    sp_loss,
    standardized_logits,
)
from pcka.losses.numerics import CONSTANT_UP_TO, leave_out_constant, unit_length, without_autocast

STANDARDIZED = [name for name in losses.names() if "standardize" in losses.defaults(name)]


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


def numpy_standardized_kd(student: np.ndarray, teacher: np.ndarray, temperature: float) -> complex:
    total = 0.0
    for s, t in zip(student, teacher):
        powers = []
        for z in (s, t):
            centered = z - z.sum() / len(z)
            deviation = ((centered**2).sum() / (len(z) - 1)) ** 0.5
            powers.append(np.exp(centered / (deviation + 1e-7) / temperature))
        p_s, p_t = (power / power.sum() for power in powers)
        total += (p_t * (np.log(p_t) - np.log(p_s))).sum()
    return temperature**2 * total / len(student)


def test_value_and_gradient_of_standardized_kd_from_the_definition(draw, meets_numpy):
    loss = losses.build("KD", weight=9.0, temperature=2.0, standardize=True)
    meets_numpy(
        lambda s, t: loss(Outputs(s), Outputs(t), None)["loss_kd"],
        lambda s, t: 9 * numpy_standardized_kd(s, t, 2.0),
        draw(0, 6, 5, scale=3),
        draw(1, 6, 5, scale=2),
    )


def test_the_losses_on_kl_divergence_have_the_switch():
    assert STANDARDIZED == ["DKD", "KD", "NKD", "RLD"]


@pytest.mark.parametrize("name", STANDARDIZED)
def test_shift_and_scale_of_a_sample_cost_nothing(draw, name):
    student, teacher, target = draw(0, 6, 5), draw(1, 6, 5), torch.arange(6) % 5
    loss = losses.build(name, standardize=True)
    scale, shift = draw(2, 6, 1).exp(), draw(3, 6, 1)
    terms = [
        loss(Outputs(logits), Outputs(teacher), target)
        for logits in (student, scale * student + shift)
    ]
    torch.testing.assert_close(*terms, rtol=1e-5, atol=1e-9)
    plain = losses.build(name)(Outputs(student), Outputs(teacher), target)
    assert all((terms[0][term] - plain[term]).abs() > 1e-3 for term in plain)


def test_logits_without_a_scale_are_zero_with_a_finite_gradient(draw):
    student = draw(0, 4, 5)
    student[1] = 3.0
    student.requires_grad_()
    z = standardized_logits(student)
    assert z[1].tolist() == [0.0] * 5
    assert z[0].var().item() == pytest.approx(1)
    (gradient,) = torch.autograd.grad(kd_loss(z, draw(1, 4, 5)), student)
    assert gradient.isfinite().all()


def test_half_logits_are_widened_first(draw):
    logits = draw(0, 4, 5, scale=1000).half()
    z = standardized_logits(logits)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.double(), standardized_logits(logits.double()))


@pytest.mark.parametrize("up_to", CONSTANT_UP_TO.values())
def test_enough_samples_change_nothing(up_to):
    loss = torch.tensor(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert leave_out_constant(loss, samples=up_to + 1, up_to=up_to, level="a") is loss


@pytest.mark.parametrize("samples", [2, 1])
def test_a_constant_loss_is_an_attached_zero(samples):
    x = torch.tensor(0.3, requires_grad=True)
    with pytest.warns(DegenerateLevelWarning, match=rf"a: .* {samples} sample"):
        loss = leave_out_constant(x.square(), samples=samples, up_to=2, level="a")
    loss.backward()
    assert loss.item() == 0
    assert x.grad.item() == 0


FEWEST = {  # shapes of the fewest samples, or values, between which there is a relation
    cc_neighbours_loss: (2, 5),
    pkd_loss: (1, 4, 1, 3),
    pkt_loss: (2, 5),
    rkd_loss: (3, 5),
    sp_loss: (2, 5),
}


@pytest.mark.parametrize("loss", FEWEST)
def test_relations_of_too_few_samples_are_left_out_with_a_warning(draw, loss):
    student, teacher = (draw(seed, *FEWEST[loss]).requires_grad_() for seed in (0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (gradient,) = torch.autograd.grad(loss(student, teacher), student)
    assert gradient.norm() > 1e-3
    along = 3 if student.dim() == 4 else 0
    for count in range(1, student.shape[along]):
        fewer = [x.detach().narrow(along, 0, count).requires_grad_() for x in (student, teacher)]
        with pytest.warns(DegenerateLevelWarning, match=rf"^{loss.__name__}: .* {count} sample"):
            left_out = loss(*fewer)
        (gradient,) = torch.autograd.grad(left_out, fewer[0])
        assert left_out.item() == 0
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize(
    ("loss", "shape", "settings", "level"),
    [
        (dist_loss, (2, 5), {"beta": 0}, "dist_loss between samples: "),
        (dist_loss, (6, 2), {"gamma": 0}, "dist_loss between classes: "),
        (itrd_loss, (2, 5), {"mutual_weight": 0}, "loss_itrd_correlation: "),
    ],
)
def test_a_correlation_of_two_numbers_is_left_out_with_a_warning(
    draw, loss, shape, settings, level
):
    student = draw(0, *shape).requires_grad_()
    with pytest.warns(DegenerateLevelWarning, match=f"^{level}") as caught:
        left_out = loss(student, draw(1, *shape), **settings)
    assert len(caught) == 1
    (gradient,) = torch.autograd.grad(left_out, student)
    assert left_out.item() == 0
    assert gradient.count_nonzero() == 0


def test_each_level_warns_once():
    with pytest.warns(DegenerateLevelWarning) as caught:
        for level in ("a", "b", "a", "b"):
            leave_out_constant(torch.tensor(0.3), samples=1, up_to=2, level=level)
    assert [str(w.message).split(":")[0] for w in caught] == ["a", "b"]
