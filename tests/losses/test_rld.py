from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka.losses import RLD, Outputs, rld_loss

TARGET = [0, 1, 2, 3, 4, 0]


def numpy_rld(student, teacher, target, alpha, beta, temperature, sure) -> complex:
    """Sample by sample, over the classes that are compared alone."""
    total = 0.0
    for s, t, y in zip(student, teacher, target):
        p_s, p_t = (
            np.exp(s / sure) / np.exp(s / sure).sum(),
            np.exp(t / sure) / np.exp(t / sure).sum(),
        )
        for b_s, b_t in ((p_s[y], p_t.max()), (1 - p_s[y], 1 - p_t.max())):
            total += alpha * sure**2 * b_t * (np.log(b_t) - np.log(b_s))
        below = [k for k in range(len(t)) if t[k] < t[y]]
        if not below:
            continue
        q_s, q_t = (np.exp(x[below] / temperature) for x in (s, t))
        q_s, q_t = q_s / q_s.sum(), q_t / q_t.sum()
        total += beta * temperature**2 * (q_t * (np.log(q_t) - np.log(q_s))).sum()
    return total / len(student)


@pytest.mark.parametrize(
    ("alpha", "beta", "temperature", "sure"),
    [(1.0, 8.0, 4.0, 1.0), (2.0, 0.0, 4.0, 3.0), (0.0, 1.0, 0.5, 1.0)],
)
def test_value_and_gradient_from_the_definition(draw, meets_numpy, alpha, beta, temperature, sure):
    settings = {"alpha": alpha, "beta": beta, "temperature": temperature}
    teacher = draw(1, 6, 5, scale=3)
    teacher[2] = torch.tensor([1.0, 2.0, -4.0, 3.0, 0.0])  # ranks the target, 2, last
    meets_numpy(
        lambda s, t: rld_loss(s, t, torch.tensor(TARGET), confidence_temperature=sure, **settings),
        lambda s, t: numpy_rld(s, t, TARGET, *settings.values(), sure),
        draw(0, 6, 5, scale=2),
        teacher,
    )


def test_a_wrong_teacher_lends_its_confidence_to_the_label():
    """It is sure of class 0; the student is to be as sure of 1, its label, and is: no loss."""
    teacher = torch.tensor([[3.0, 1.0, -1.0]]).double()
    student = torch.tensor([[1.0, 3.0, -1.0]]).double()
    loss = rld_loss(student, teacher, torch.tensor([1]), beta=0.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert rld_loss(teacher, teacher, torch.tensor([1]), beta=0.0).item() > 0.5


def test_classes_that_the_teacher_ranks_above_the_label_are_left_out():
    teacher = torch.tensor([[5.0, 1.0, 0.0, -1.0]]).double()
    student = teacher.clone().requires_grad_()
    moved = torch.tensor([[-2.0, 4.0, 0.0, -1.0]]).double()  # only the classes 0 and 1
    target = torch.tensor([1])
    assert rld_loss(moved, teacher, target, alpha=0.0).item() == pytest.approx(0, abs=1e-12)
    rld_loss(student + torch.eye(4)[3], teacher, target, alpha=0.0).backward()
    assert student.grad[0, :2].tolist() == [0, 0]
    assert student.grad[0, 2:].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_teacher_that_ranks_the_label_last_gives_no_nan(draw, dtype):
    student = draw(0, 4, 5, scale=30).to(dtype).requires_grad_()
    teacher = draw(1, 4, 5, scale=30).to(dtype)
    loss = rld_loss(student, teacher, teacher.argmin(1), alpha=0.0)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_gradient_reaches_only_the_student(draw):
    student, teacher = draw(0, 6, 5).requires_grad_(), draw(1, 6, 5).requires_grad_()
    rld_loss(student, teacher, torch.tensor(TARGET)).backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None


def test_module_weighs_the_function(draw):
    student, teacher, target = draw(0, 6, 5), draw(1, 6, 5), torch.tensor(TARGET)
    settings = {"alpha": 2.0, "beta": 3.0, "temperature": 2.0, "confidence_temperature": 1.5}
    terms = RLD(weight=3.0, **settings)(Outputs(student), Outputs(teacher), target)
    assert list(terms) == ["loss_rld"]
    expected = 3 * rld_loss(student, teacher, target, **settings)
    torch.testing.assert_close(terms["loss_rld"], expected)


def test_refusals(draw):
    student, teacher, target = draw(0, 6, 5), draw(1, 6, 5), torch.tensor(TARGET)
    with pytest.raises(ValueError, match="logits of one shape"):
        rld_loss(student, draw(1, 6, 4), target)
    with pytest.raises(ValueError, match="target must hold a class index"):
        rld_loss(student, teacher, target[:2])
    for key in ("temperature", "confidence_temperature"):
        with pytest.raises(ValueError, match=f"{key} must be positive and finite"):
            rld_loss(student, teacher, target, **{key: 0.0})
        with pytest.raises(ValueError, match=f"{key} must be positive and finite"):
            RLD(**{key: 0.0})
    with pytest.raises(ValueError, match="beta must be finite and at least 0"):
        RLD(beta=-1.0)
    with pytest.raises(ValueError, match="target: RLD needs it"):
        RLD()(Outputs(student), Outputs(teacher), None)
