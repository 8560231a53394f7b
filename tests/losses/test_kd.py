from __future__ import annotations

import pytest
import torch

from pcka.losses import KD, Outputs, kd_loss


def test_record_of_the_original_implementation(meets_record):
    meets_record("kd_T4", lambda s, t: kd_loss(s, t, temperature=4.0))


def test_equal_logits_up_to_a_shift_cost_nothing(draw):
    logits = draw(0, 6, 5)
    assert kd_loss(logits + 3, logits).item() == pytest.approx(0, abs=1e-12)


def test_gradient_reaches_only_the_student(draw):
    student, teacher = draw(0, 6, 5).requires_grad_(), draw(1, 6, 5).requires_grad_()
    kd_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_widened_first(draw, dtype):
    # Differences this large underflow a softmax in half precision.
    student, teacher = draw(0, 6, 5, scale=50).to(dtype), draw(1, 6, 5, scale=50).to(dtype)
    loss = kd_loss(student, teacher, temperature=1.0)
    assert loss.dtype == torch.float32
    exact = kd_loss(student.double(), teacher.double(), temperature=1.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_module_weighs_the_function(draw):
    student, teacher = draw(0, 6, 5), draw(1, 6, 5)
    terms = KD(weight=0.9, temperature=2.0)(Outputs(student), Outputs(teacher), None)
    assert list(terms) == ["loss_kd"]
    torch.testing.assert_close(terms["loss_kd"], 0.9 * kd_loss(student, teacher, temperature=2.0))


def test_refusals(draw):
    with pytest.raises(ValueError, match="logits of one shape"):
        kd_loss(draw(0, 6, 5), draw(1, 6, 4))
    with pytest.raises(ValueError, match="temperature must be positive"):
        kd_loss(draw(0, 6, 5), draw(1, 6, 5), temperature=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        KD(temperature=-1.0)
    with pytest.raises(ValueError, match="teacher: KD needs it"):
        KD()(Outputs(draw(0, 6, 5)), None, None)
