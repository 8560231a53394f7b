from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pcka.losses import ITRD, Outputs, itrd_loss


def numpy_itrd(student, teacher, weights, alpha) -> complex:
    """Channel by channel and pair of samples by pair of samples."""
    samples, width = student.shape
    total = 0.0
    for j in range(width):
        s, t = student[:, j], teacher[:, j]
        covariance = ((s - s.mean()) * (t - t.mean())).sum() / (samples - 1)
        deviations = [(((x - x.mean()) ** 2).sum() / (samples - 1)) ** 0.5 for x in (s, t)]
        correlation = covariance / deviations[0] / deviations[1]
        total += (1 - correlation * (samples - 1) / samples) ** (2 * alpha)
    cosine = [
        np.array([[(a * b).sum() / ((a**2).sum() * (b**2).sum()) ** 0.5 for b in x] for a in x])
        for x in (student, teacher)
    ]
    squares = [((g / np.trace(g)) ** 2).sum() for g in (cosine[0], cosine[0] * cosine[1])]
    return weights[0] * np.log(total) / np.log(2) + weights[1] * (squares[0] - squares[1])


@pytest.mark.parametrize(
    ("weights", "alpha"), [((2.0, 1.0), 1.01), ((1.0, 0.0), 1.5), ((0.0, 1.0), 1.01)]
)
def test_value_and_gradient_from_the_definition(draw, meets_numpy, weights, alpha):
    settings = dict(zip(("correlation_weight", "mutual_weight"), weights))
    meets_numpy(
        lambda s, t: itrd_loss(s, t, alpha=alpha, **settings),
        lambda s, t: numpy_itrd(s, t, weights, alpha),
        draw(0, 6, 5, scale=3),
        draw(1, 6, 5, scale=2),
    )


def test_scale_and_shift_of_a_channel_are_free_and_the_end_is_finite(draw):
    teacher = draw(0, 8, 5)
    student = teacher * draw(1, 5).exp() + draw(2, 5)
    loss = itrd_loss(student, teacher, correlation_weight=1.0, mutual_weight=0.0, alpha=1.5)
    assert loss.item() == pytest.approx(math.log2(5 * (1 / 8) ** 3))


def test_a_channel_that_is_constant_is_uncorrelated(draw):
    student, teacher = draw(0, 6, 5).requires_grad_(), draw(1, 6, 5)
    dead = torch.ones(5).double()
    dead[3] = 0
    loss = itrd_loss(student * dead, teacher * dead.flip(0), mutual_weight=0.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad[:, 3].abs().max() == student.grad[:, 1].abs().max() == 0


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e25])
def test_norms_neither_vanish_nor_overflow(draw, scale):
    student, teacher = draw(0, 6, 5).float(), draw(1, 6, 5).float()
    student.requires_grad_()
    loss = itrd_loss(scale * student, teacher, correlation_weight=0.0)
    loss.backward()
    expected = itrd_loss(student, teacher, correlation_weight=0.0).item() if scale else 0.0
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    assert student.grad.isfinite().all()


def test_gram_matrices_are_not_rounded_under_autocast(draw):
    student, teacher = draw(0, 6, 5).float(), draw(1, 6, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = itrd_loss(student, teacher)
    torch.testing.assert_close(loss, itrd_loss(student, teacher), rtol=1e-6, atol=0)


def test_gradient_reaches_only_the_student(draw):
    student, teacher = draw(0, 6, 5).requires_grad_(), draw(1, 6, 5).requires_grad_()
    itrd_loss(student, teacher).backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None


@pytest.mark.parametrize(("shape", "embedded"), [((6, 5, 3, 3), False), ((6, 3, 4, 4), True)])
def test_module_embeds_the_student_and_compares_its_own_features_where_it_can(
    draw, shape, embedded
):
    own, other = draw(0, *shape), draw(1, 6, 5, 2, 2)
    student, teacher = Outputs(features={"last": own}), Outputs(features={"last": other})
    loss = ITRD(stage="last", correlation_weight=3.0, mutual_weight=5.0, alpha=1.5)
    loss.prepare(student, teacher)
    terms = loss(student, teacher, None)
    weight, bias = (p.detach() for p in (loss.embedding.weight, loss.embedding.bias))
    means = own.mean((2, 3))
    projected, target = means @ weight.T + bias, other.mean((2, 3))
    compared = projected if embedded else means
    settings = {"correlation_weight": 3.0, "mutual_weight": 0.0, "alpha": 1.5}
    expected = itrd_loss(projected, target, **settings)
    torch.testing.assert_close(terms.pop("loss_itrd_correlation"), expected)
    settings |= {"correlation_weight": 0.0, "mutual_weight": 5.0}
    torch.testing.assert_close(
        terms.pop("loss_itrd_mutual"), itrd_loss(compared, target, **settings)
    )
    assert not terms


def test_refusals(draw):
    with pytest.raises(ValueError, match=r"one shape \(B, D\) with two samples or more"):
        itrd_loss(draw(0, 6, 5), draw(1, 6, 4))
    with pytest.raises(ValueError, match=r"one shape \(B, D\) with two samples or more"):
        itrd_loss(draw(0, 1, 5), draw(1, 1, 5))
    with pytest.raises(ValueError, match="alpha must be positive and finite"):
        ITRD(alpha=0.0)
    tokens = Outputs(features={"pooled": draw(0, 6, 4, 5)})
    with pytest.raises(ValueError, match=r"must be pooled \(B, D\) or maps.*:map"):
        ITRD().prepare(tokens, tokens)
    with pytest.raises(ValueError, match="teacher: ITRD needs it"):
        ITRD().prepare(Outputs(features={"pooled": draw(0, 6, 5)}), None)
