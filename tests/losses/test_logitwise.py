from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka import losses
from pcka.losses import Outputs, kd_loss, standardized_logits

STANDARDIZED = [name for name in losses.names() if "standardize" in losses.defaults(name)]


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
    assert STANDARDIZED == ["DKD", "KD", "NKD"]


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
