from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka.losses import WTTM, Outputs, kd_loss, wttm_loss


def numpy_wttm(student: np.ndarray, teacher: np.ndarray, gamma: float) -> complex:
    """Sample by sample, from the probabilities themselves."""
    total = 0.0
    for s, t in zip(student, teacher):
        p_s, p_t = np.exp(s) / np.exp(s).sum(), np.exp(t) / np.exp(t).sum()
        power = p_t**gamma
        transformed = power / power.sum()
        total += power.sum() * (transformed * (np.log(transformed) - np.log(p_s))).sum()
    return total / len(student)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
def test_value_and_gradient_from_the_definition(draw, meets_numpy, gamma):
    meets_numpy(
        lambda s, t: wttm_loss(s, t, gamma=gamma),
        lambda s, t: numpy_wttm(s, t, gamma),
        draw(0, 6, 5, scale=3),
        draw(1, 6, 5, scale=3),
    )


def test_a_power_of_one_is_kd_without_temperature(draw):
    student, teacher = draw(0, 6, 5), draw(1, 6, 5)
    expected = kd_loss(student, teacher, temperature=1.0)
    torch.testing.assert_close(wttm_loss(student, teacher, gamma=1.0), expected)


def test_a_sample_weighs_by_how_soft_the_teacher_is_about_it(draw):
    """Between 1 for a teacher that is sure, and ``P^(1 - gamma)`` for one that knows nothing."""
    student = draw(0, 1, 5)
    for teacher, weight in (([0.0] * 5, 5**0.8), ([200.0, 0, 0, 0, 0], 1.0)):
        teacher = torch.tensor([teacher]).double()
        divergence = kd_loss(student, 0.2 * teacher, temperature=1.0)
        loss = wttm_loss(student, teacher, gamma=0.2)
        assert loss.item() == pytest.approx(weight * divergence.item())


def test_gradient_reaches_only_the_student(draw):
    student, teacher = draw(0, 6, 5).requires_grad_(), draw(1, 6, 5).requires_grad_()
    wttm_loss(student, teacher).backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None


def test_module_weighs_the_function(draw):
    student, teacher = draw(0, 6, 5), draw(1, 6, 5)
    terms = WTTM(weight=3.0, gamma=0.4)(Outputs(student), Outputs(teacher), None)
    assert list(terms) == ["loss_wttm"]
    torch.testing.assert_close(terms["loss_wttm"], 3 * wttm_loss(student, teacher, gamma=0.4))


def test_refusals(draw):
    with pytest.raises(ValueError, match="logits of one shape"):
        wttm_loss(draw(0, 6, 5), draw(1, 6, 4))
    for gamma in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="gamma must be positive and finite"):
            wttm_loss(draw(0, 6, 5), draw(1, 6, 5), gamma=gamma)
        with pytest.raises(ValueError, match="gamma must be positive and finite"):
            WTTM(gamma=gamma)
