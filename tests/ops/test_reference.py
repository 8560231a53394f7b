"""The oracle itself, against NumPy and against the paper's theorems."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pcka.ops import reference


def numpy_cka(x: np.ndarray, y: np.ndarray, *, center: bool = True) -> float:
    """CKA straight from its definition, with the centering matrix H written out."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n if center else np.eye(n)
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h
    return float((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()))


def random_pair(n: int = 12, d_x: int = 20, d_y: int = 7, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    return rng.normal(1.0, 1.0, (n, d_x)), rng.normal(-0.5, 2.0, (n, d_y))


@pytest.mark.parametrize("center", [True, False])
def test_cka_is_its_definition(center):
    x, y = random_pair()
    result = reference.cka(torch.from_numpy(x), torch.from_numpy(y), center=center)
    assert result.item() == pytest.approx(numpy_cka(x, y, center=center), rel=1e-12)


def test_theorem_1_uncentered_cka_is_a_cosine_and_has_a_feature_form():
    x, y = random_pair()
    cka = reference.cka(torch.from_numpy(x), torch.from_numpy(y), center=False).item()
    k, l = (x @ x.T).ravel(), (y @ y.T).ravel()
    cosine = k @ l / (np.linalg.norm(k) * np.linalg.norm(l))
    features = np.linalg.norm(y.T @ x) ** 2
    features /= np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    assert cka == pytest.approx(cosine, rel=1e-12)
    assert cka == pytest.approx(features, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_theorem_2_one_minus_cka_bounds_a_squared_mean_difference(seed):
    x, y = random_pair(seed=seed)
    n = len(x)
    cka = reference.cka(torch.from_numpy(x), torch.from_numpy(y), center=False).item()
    a, b = (g / np.linalg.norm(g) for g in (x @ x.T, y @ y.T))
    assert 1 - cka == pytest.approx(0.5 * n**2 * ((a - b) ** 2).mean(), rel=1e-10)
    assert 1 - cka >= 0.5 * n**2 * (a.mean() - b.mean()) ** 2


def test_unbiased_hsic_is_the_u_statistic():
    """Song et al. 2012, theorem 2: an average over all tuples of four distinct samples."""
    from itertools import permutations

    x, y = random_pair(n=6)
    k, l = x @ x.T, y @ y.T
    total = [
        k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in permutations(range(6), 4)
    ]
    result = reference.unbiased_hsic(torch.from_numpy(k)[None], torch.from_numpy(l)[None])
    assert result.item() == pytest.approx(np.mean(total), rel=1e-10)


def test_unbiased_cka_does_not_mistake_noise_for_alignment():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, 6, 512, generator=generator, dtype=torch.float64) for _ in range(2))
    assert reference.cka(x, y).mean() > 0.9
    assert reference.cka(x, y, unbiased=True).mean().abs() < 0.05


def test_row_normalize_centers_first_and_keeps_zero_rows_zero():
    x, y = random_pair(n=6)
    x = x - x.mean(0)
    x[2], x[3] = 0, x[3] + x[2]  # still centered, with one sample at the mean
    k, l = x @ x.T, (y - y.mean(0)) @ (y - y.mean(0)).T
    with np.errstate(divide="ignore", invalid="ignore"):
        k = np.nan_to_num(k / np.sqrt(np.diag(k))[:, None], posinf=0, neginf=0)
        l = l / np.sqrt(np.diag(l))[:, None]
    expected = (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())
    x = torch.from_numpy(x + 3)
    result = reference.cka(x, torch.from_numpy(y), row_normalize=True)
    assert result.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("group_by", "shape"),
    [("channel", (3, 4, 2 * 2 * 4)), ("batch", (2, 4, 3 * 2 * 4)), ("position", (8, 4, 2 * 3))],
)
def test_patchify_puts_every_pixel_in_its_group_and_row(group_by, shape):
    x = torch.arange(2 * 3 * 4 * 8, dtype=torch.float64).reshape(2, 3, 4, 8)
    rows = reference.patchify(x, (2, 4), group_by)
    assert rows.shape == shape
    for b, c, h, w in np.ndindex(2, 3, 4, 8):
        n, position = (h // 2) * 2 + w // 4, (h % 2) * 4 + w % 4
        group, column = {
            "channel": (c, b * 8 + position),
            "batch": (b, c * 8 + position),
            "position": (position, b * 3 + c),
        }[group_by]
        assert rows[group, n, column] == x[b, c, h, w]


def test_patch_gram_resizes_up_to_the_next_multiple():
    x = torch.randn(1, 2, 5, 9, dtype=torch.float64)
    resized = F.interpolate(x, size=(6, 12), mode="bilinear", align_corners=False)
    options = {"patch_size": (3, 4), "group_by": "channel", "center": True}
    assert torch.equal(reference.patch_gram(x, **options), reference.patch_gram(resized, **options))
