"""Grams of student and teacher, against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka.analysis import patch_grams, sample_grams
from pcka.losses import fcka_loss, pcka_loss


def enlarged(extent: int, size: int) -> np.ndarray:
    """The matrix ``(size, extent)`` of a bilinear resize, ``align_corners=False``."""
    matrix = np.zeros((size, extent))
    for row in range(size):
        at = max(0.0, (row + 0.5) * extent / size - 0.5)
        low = min(int(at), extent - 1)
        high = min(low + 1, extent - 1)
        matrix[row, low] += 1 - (at - low)
        matrix[row, high] += at - low
    return matrix


def patches(x: np.ndarray, patch: tuple[int, int], group_by: str) -> np.ndarray:
    """``(B, C, H, W)`` -> ``(G, N, D)``, entry by entry."""
    h, w = x.shape[2:]
    n_h, n_w = -(-h // patch[0]), -(-w // patch[1])
    rows, columns = enlarged(h, n_h * patch[0]), enlarged(w, n_w * patch[1])
    x = np.einsum("rh,bchw,sw->bcrs", rows, x, columns)
    blocks = [
        x[:, :, i * patch[0] : (i + 1) * patch[0], j * patch[1] : (j + 1) * patch[1]]
        for i in range(n_h)
        for j in range(n_w)
    ]
    stacked = np.stack(blocks)  # (N, B, C, P_H, P_W)
    groups = np.moveaxis(stacked, {"batch": 1, "channel": 2}[group_by], 0)
    return groups.reshape(len(groups), n_h * n_w, -1)


def units(rows: np.ndarray, center: bool) -> np.ndarray:
    """``(G, N, D)`` -> Grams of unit norm, ``(G, N, N)``."""
    if center:
        rows = rows - rows.mean(1, keepdims=True)
    grams = rows @ rows.transpose(0, 2, 1)
    return grams / np.linalg.norm(grams, axis=(1, 2), keepdims=True)


@pytest.mark.parametrize("group_by", ["channel", "batch"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("size", "patch"), [((8, 12), (4, 4)), ((7, 10), (2, 3))])
def test_grams_of_patches_are_numpys(group_by, center, size, patch):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, *size, dtype=torch.float64) + 1
    pair = patch_grams(student, teacher, patch_size=patch, group_by=group_by, center=center)
    own, other = (units(patches(x.numpy(), patch, group_by), center) for x in (student, teacher))
    np.testing.assert_allclose(pair.student, own.mean(0), atol=1e-9, rtol=0)
    np.testing.assert_allclose(pair.teacher, other.mean(0), atol=1e-9, rtol=0)
    np.testing.assert_allclose(pair.alignment, (own * other).sum((1, 2)), atol=1e-9, rtol=0)
    assert pair.grid == (-(-size[0] // patch[0]), -(-size[1] // patch[1]))
    assert pair.student.dtype == torch.float64


def test_grams_of_samples_are_numpys_whatever_the_widths():
    torch.manual_seed(0)
    student = torch.randn(6, 3, 4, 4, dtype=torch.float64) + 1
    teacher = torch.randn(6, 5, dtype=torch.float64)
    pair = sample_grams(student, teacher)
    own, other = (units(x.flatten(1).numpy()[None], True) for x in (student, teacher))
    np.testing.assert_allclose(pair.student, own[0], atol=1e-9, rtol=0)
    np.testing.assert_allclose(pair.teacher, other[0], atol=1e-9, rtol=0)
    assert pair.cka == pytest.approx((own * other).sum(), abs=1e-9)
    assert pair.grid is None


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_grams_do_not_depend_on_the_scale_of_the_features(scale):
    features = torch.randn(2, 6, 5)
    found, expected = sample_grams(*(scale * features)), sample_grams(*features)
    for side in ("student", "teacher", "alignment"):
        torch.testing.assert_close(getattr(found, side), getattr(expected, side))


def test_the_cka_is_what_the_losses_leave_of_1():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 9, 8)
    pair = patch_grams(student, teacher, patch_size=3)
    assert pair.cka == pytest.approx(1 - pcka_loss(student, teacher, patch_size=3).item(), abs=1e-6)
    student, teacher = torch.randn(2, 5, 3, 9, 8)
    expected = 1 - fcka_loss(student, teacher).item()
    assert sample_grams(student, teacher).cka == pytest.approx(expected, abs=1e-6)


def test_what_differs_in_a_channel_is_its_loss():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)
    pair = patch_grams(student[:, 1:2], teacher[:, 1:2], patch_size=2)
    whole = patch_grams(student, teacher, patch_size=2)
    assert pair.cka == pytest.approx(whole.alignment[1].item(), abs=1e-12)
    squares = (pair.student - pair.teacher).square().sum().item()
    assert squares / 2 == pytest.approx(1 - pair.cka, abs=1e-9)


def test_a_channel_that_is_constant_up_to_rounding_adds_nothing():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 2, 8, 8)
    student[:, 1] = 1 + torch.finfo(torch.float32).eps * torch.randint(2, (8, 8))
    pair = patch_grams(student, teacher, patch_size=2)
    alone = patch_grams(student[:, :1], teacher[:, :1], patch_size=2)
    torch.testing.assert_close(pair.student, alone.student / 2)
    assert pair.alignment[1] == 0


def test_maps_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape .*1x1 convolution"):
        patch_grams(torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="patch_size must be a positive int"):
        patch_grams(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8), patch_size=0)
