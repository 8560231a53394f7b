from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka import losses
from pcka.losses import IKL, Outputs, ikl_loss, kd_loss

SETTINGS = {"temperature": 2.0, "weight_temperature": 3.0}


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def test_both_parts_from_the_definition(draw):
    student, teacher = draw(0, 6, 5, scale=3), draw(1, 6, 5, scale=3)
    cross_entropy, square_error = 0.0, 0.0
    for s, t in zip(student.numpy(), teacher.numpy()):
        cross_entropy -= (softmax(t / 2) * np.log(softmax(s / 2))).sum() / 6
        w = softmax(t / 3)
        for j in range(5):
            for k in range(5):
                gap = (t[j] - t[k]) - (s[j] - s[k])
                square_error += w[j] * w[k] * gap**2 / 4 / 6
    parts = {(1.0, 0.0): cross_entropy, (0.0, 1.0): square_error}
    for (alpha, beta), expected in parts.items():
        loss = ikl_loss(student, teacher, alpha=alpha, beta=beta, **SETTINGS)
        assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_gradient_of_the_cross_entropy_is_that_of_kl_divergence(draw):
    student, teacher = draw(0, 6, 5).requires_grad_(), draw(1, 6, 5)
    grads = [
        torch.autograd.grad(loss, student)[0]
        for loss in (ikl_loss(student, teacher, beta=0.0), kd_loss(student, teacher))
    ]
    torch.testing.assert_close(16 * grads[0], grads[1])


def test_a_shift_of_the_logits_costs_nothing(draw):
    student, teacher, shift = draw(0, 6, 5), draw(1, 6, 5), 7 * draw(2, 6, 1)
    torch.testing.assert_close(ikl_loss(student + shift, teacher), ikl_loss(student, teacher))
    square_error = ikl_loss(teacher + shift, teacher, alpha=0.0)
    assert square_error.item() == pytest.approx(0, abs=1e-12)


def test_gradient_reaches_only_the_student(draw):
    student, teacher = draw(0, 6, 5).requires_grad_(), draw(1, 6, 5).requires_grad_()
    ikl_loss(student, teacher).backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None


def test_module_has_the_published_defaults(draw):
    assert losses.defaults("IKL") == {
        "weight": 1.0, "alpha": 1.0, "beta": 4.0, "temperature": 4.0, "weight_temperature": 100.0,
    }  # fmt: skip
    student, teacher = draw(0, 6, 5), draw(1, 6, 5)
    terms = IKL(weight=0.5, alpha=3.0, beta=2.0, **SETTINGS)(
        Outputs(student), Outputs(teacher), None
    )
    assert list(terms) == ["loss_ikl"]
    expected = 0.5 * ikl_loss(student, teacher, alpha=3.0, beta=2.0, **SETTINGS)
    torch.testing.assert_close(terms["loss_ikl"], expected)


@pytest.mark.parametrize("name", ["temperature", "weight_temperature"])
def test_temperatures_have_to_be_positive(draw, name):
    with pytest.raises(ValueError, match="temperature must be positive"):
        IKL(**{name: 0.0})
    with pytest.raises(ValueError, match="temperature must be positive"):
        ikl_loss(draw(0, 6, 5), draw(1, 6, 5), **{name: -1.0})


@pytest.mark.parametrize("masked", ["student", "teacher", "both"])
def test_a_class_that_is_masked_out_leaves_the_loss_of_the_others(draw, masked):
    student, teacher = draw(0, 6, 5), draw(1, 6, 5)
    for role, logits in (("student", student), ("teacher", teacher)):
        if masked in (role, "both"):
            logits[:, 2] = -torch.inf
    student.requires_grad_()
    loss = ikl_loss(student, teacher)
    rest = [0, 1, 3, 4]
    torch.testing.assert_close(loss, ikl_loss(student[:, rest], teacher[:, rest]))
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all() and gradient.norm() > 0
