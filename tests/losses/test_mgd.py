"""MGD against its equations in NumPy, and the masks it draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from pcka import losses
from pcka.losses import Outputs, mgd, mgd_loss


def _conv3x3(x, layer):
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    windows = sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
    return np.einsum("oiyx,bihwyx->bohw", weight, windows) + bias[:, None, None]


def _generated(generation, x, mask):
    if align := [p.detach().numpy() for p in generation.align.parameters()]:
        kernel, bias = align
        x = np.einsum("oc,bchw->bohw", kernel[:, :, 0, 0], x) + bias[:, None, None]
    hidden = np.maximum(_conv3x3(x * mask, generation.generate[0]), 0)
    return _conv3x3(hidden, generation.generate[2])


def _pair(draw, dtype=torch.float64, c_s=3, c_t=5):
    student = Outputs(features={"last": draw(0, 4, c_s, 4, 6).to(dtype)})
    return student, Outputs(features={"last": draw(1, 4, c_t, 4, 6).to(dtype)})


def _prepared(draw, dtype=torch.float64, c_s=3, c_t=5, **settings):
    torch.manual_seed(0)
    loss = losses.build("MGD", **settings)
    loss.prepare(*_pair(draw, dtype, c_s, c_t))
    return loss


def test_mgd_loss_is_the_squared_difference_of_a_sample(draw):
    student, teacher = draw(0, 4, 3, 5, 4), draw(1, 4, 3, 5, 4)
    expected = ((student.numpy() - teacher.numpy()) ** 2).sum() / 4
    assert mgd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_the_larger_map_is_pooled_to_the_smaller(draw):
    student, teacher = draw(0, 2, 3, 4, 6), draw(1, 2, 3, 8, 6)
    pooled = teacher.view(2, 3, 4, 2, 6).mean(3)
    expected = mgd_loss(student, pooled).item()
    assert mgd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("mask", "shape"), [("channels", (4, 5, 1, 1)), ("positions", (4, 1, 4, 6))]
)
@pytest.mark.parametrize("c_s", [3, 5])
def test_module_aligns_masks_and_generates(draw, mask, shape, c_s):
    loss = _prepared(draw, c_s=c_s, mask=mask, mask_ratio=0.4, weights=(0.5,))
    student, teacher = _pair(draw, c_s=c_s)
    torch.manual_seed(7)
    kept = (torch.rand(shape) >= 0.4).numpy()
    assert 0 < kept.mean() < 1
    x = _generated(loss.adapters["last"], student.features["last"].numpy(), kept)
    expected = 0.5 * ((x - teacher.features["last"].numpy()) ** 2).sum() / 4
    torch.manual_seed(7)
    terms = loss(student, teacher, None)
    assert terms.keys() == {"loss_mgd_last"}
    assert terms["loss_mgd_last"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("over", mgd.MASKS)
@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.65])
def test_the_mask_hides_the_ratio_of_each_sample_anew(over, ratio):
    torch.manual_seed(0)
    mask = mgd.random_mask(torch.zeros(20, 300, 15, 20), ratio, over)
    assert mask.dtype == torch.bool
    assert 1 - mask.double().mean().item() == pytest.approx(ratio, abs=0.03)
    assert len(mask.flatten(1).unique(dim=0)) == (20 if ratio else 1)


def test_equal_widths_need_no_alignment(draw):
    names = {name.split(".")[2] for name in _prepared(draw, c_s=5).state_dict()}
    assert names == {"generate"}


def test_gradient_reaches_the_student_and_the_generation_alone(draw):
    loss = _prepared(draw)
    student, teacher = _pair(draw)
    x, y = student.features["last"].requires_grad_(), teacher.features["last"].requires_grad_()
    loss(student, teacher, None)["loss_mgd_last"].backward()
    assert x.grad.norm() > 0
    assert all(parameter.grad.norm() > 0 for parameter in loss.parameters())
    assert y.grad is None


def test_bfloat16_in_and_out_of_autocast(draw):
    student, teacher = _pair(draw, torch.bfloat16)
    loss = _prepared(draw, torch.bfloat16, mask_ratio=0.0)
    exact = loss(student, teacher, None)["loss_mgd_last"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, None)["loss_mgd_last"]
    assert value.dtype == exact.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=2e-2, atol=0)


def test_an_unprepared_loss_says_so(draw):
    with pytest.raises(RuntimeError, match=r"MGD is not prepared.*Distiller\.prepare"):
        losses.build("MGD")(*_pair(draw), None)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("mask_ratio", 1.0, r"mask_ratio must be in \[0, 1\), got 1\.0"),
        ("mask", "pixels", "mask must be one of channels, positions; got 'pixels'"),
    ],
)
def test_senseless_settings_are_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        losses.build("MGD", **{setting: value})


@pytest.mark.parametrize(
    ("shape", "message"), [((2, 4, 5, 4), r"one shape \(B, C, H, W\)"), ((2, 3), "before the pool")]
)
def test_other_widths_and_no_maps_are_refused(draw, shape, message):
    with pytest.raises(ValueError, match=message):
        mgd_loss(draw(0, 2, 3, 5, 4), draw(1, *shape))


def test_pooled_features_are_refused_before_an_adapter_is_made(draw):
    student, teacher = (Outputs(features={"last": draw(seed, 4, 3)}) for seed in (0, 1))
    with pytest.raises(ValueError, match="Tap a module before the pooling"):
        losses.build("MGD").prepare(student, teacher)
