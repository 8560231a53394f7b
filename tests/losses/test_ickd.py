"""ICKD-C against its equations in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka import losses
from pcka.losses import Outputs, ickd_loss


def _reference(student, teacher):
    """Sample by sample and channel by channel."""
    total = 0.0
    for x, y in zip(student, teacher):
        gram_s, gram_t = (
            np.array([[(a * b).sum() for b in maps] for a in maps]) for maps in (x, y)
        )
        for row_s, row_t in zip(gram_s, gram_t):
            difference = row_s / np.linalg.norm(row_s) - row_t / np.linalg.norm(row_t)
            total += (difference**2).sum()
    return total / (student.shape[0] * student.shape[1])


def _pair(draw, dtype=torch.float64):
    student = {"last": draw(0, 4, 3, 4, 4), "stage1": draw(1, 4, 2, 8, 8)}
    teacher = {"last": draw(2, 4, 5, 2, 2), "stage1": draw(3, 4, 5, 8, 8)}
    return tuple(
        Outputs(features={name: x.to(dtype) for name, x in features.items()})
        for features in (student, teacher)
    )


def _prepared(draw, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    loss = losses.build("ICKD", **settings)
    loss.prepare(*_pair(draw, dtype))
    return loss


def test_ickd_loss_is_the_published_formula(draw):
    student, teacher = draw(0, 2, 3, 5, 4), draw(1, 2, 3, 2, 6)
    expected = _reference(student.numpy(), teacher.numpy())
    assert ickd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_it_does_not_see_scale_nor_the_order_of_positions(draw):
    teacher = draw(0, 2, 3, 5, 4)
    student = 7 * teacher.flip(2).transpose(2, 3)
    assert ickd_loss(student, teacher).item() == pytest.approx(0, abs=1e-24)


def test_a_dead_channel_stays_finite(draw):
    student = draw(0, 2, 3, 5, 4)
    student[:, 1] = 0
    student.requires_grad_()
    loss = ickd_loss(student, draw(1, 2, 3, 5, 4))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_module_adapts_the_width_and_weighs_each_stage(draw):
    loss = _prepared(draw, stages=("stage1", "last"), weights=(0.5, 2.0))
    student, teacher = _pair(draw)
    terms = loss(student, teacher, None)
    for stage, weight in (("stage1", 0.5), ("last", 2.0)):
        kernel = loss.adapters[stage][0].weight.detach().numpy()[:, :, 0, 0]
        x = np.einsum("oc,bchw->bohw", kernel, student.features[stage].numpy())
        mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        x = (x - mean) / np.sqrt(variance + 1e-5)
        expected = weight * _reference(x, teacher.features[stage].numpy())
        assert terms[f"loss_ickd_{stage}"].item() == pytest.approx(expected, rel=1e-9)


def test_gradient_reaches_the_student_and_the_adapter_alone(draw):
    loss = _prepared(draw)
    student, teacher = _pair(draw)
    x, y = student.features["last"].requires_grad_(), teacher.features["last"].requires_grad_()
    loss(student, teacher, None)["loss_ickd_last"].backward()
    assert x.grad.norm() > 0
    assert all(parameter.grad.norm() > 0 for parameter in loss.parameters())
    assert y.grad is None


def test_autocast_does_not_round_the_correlations(draw):
    student, teacher = draw(0, 2, 3, 5, 4).float(), draw(1, 2, 3, 5, 4).float()
    expected = ickd_loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ickd_loss(student, teacher), expected)


def test_bfloat16_in_and_out_of_autocast(draw):
    student, teacher = _pair(draw, torch.bfloat16)
    loss = _prepared(draw, torch.bfloat16)
    exact = loss(student, teacher, None)["loss_ickd_last"]
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, None)["loss_ickd_last"]
    torch.testing.assert_close(value, exact, rtol=2e-2, atol=0)


def test_an_unprepared_loss_says_so(draw):
    with pytest.raises(RuntimeError, match=r"ICKD is not prepared.*Distiller\.prepare"):
        losses.build("ICKD")(*_pair(draw), None)


@pytest.mark.parametrize("shape", [(2, 4, 5, 4), (2, 3)])
def test_other_widths_and_no_maps_are_refused(draw, shape):
    with pytest.raises(ValueError, match=r"maps \(B, C, H, W\) of the same C.*1x1"):
        ickd_loss(draw(0, 2, 3, 5, 4), draw(1, *shape))


def test_pooled_features_are_refused_before_an_adapter_is_made(draw):
    student, teacher = (Outputs(features={"last": draw(seed, 4, 3)}) for seed in (0, 1))
    with pytest.raises(ValueError, match="Tap a module before the pooling"):
        losses.build("ICKD").prepare(student, teacher)
