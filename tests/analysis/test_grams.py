from __future__ import annotations

import pytest
import torch

from pcka.analysis import grams, u_centered_gram
from pcka.ops.reference import unbiased_hsic


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("samples", [4, 7, 64, 65, 130])
def test_the_product_of_two_is_unbiased_hsic(samples):
    x, y = draw(0, samples, 3, 2) + 5, draw(1, samples, 9)
    product = (u_centered_gram(x) * u_centered_gram(y)).sum() / (samples * (samples - 3))
    k, l = ((z.flatten(1) @ z.flatten(1).T)[None] for z in (x, y))
    assert product.item() == pytest.approx(unbiased_hsic(k, l).item(), rel=1e-9)


def test_chunks_of_columns_add_up(monkeypatch):
    x = draw(0, 10, 37)
    whole = u_centered_gram(x)
    monkeypatch.setattr(grams, "_CHUNK", 40)
    torch.testing.assert_close(u_centered_gram(x), whole)


def test_it_is_symmetric_and_its_rows_sum_to_zero():
    gram = u_centered_gram(draw(0, 70, 5))
    assert torch.equal(gram, gram.T)
    assert gram.sum(0).abs().max() < 1e-12 * gram.abs().max() * 70


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_summed_in_float32(dtype):
    x = draw(0, 9, 50).to(dtype)
    gram = u_centered_gram(x)
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, u_centered_gram(x.double()), rtol=1e-4, atol=1e-4)


def test_autocast_rounds_nothing():
    x = draw(0, 9, 50).float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = u_centered_gram(x)
    assert torch.equal(rounded, u_centered_gram(x))


def test_the_rounding_of_a_constant_layer_is_no_similarity():
    x = torch.full((9, 700), 0.1).cumsum(1).sin() * 1e3  # one row nine times
    x[0, 0] = x[0, 0].nextafter(torch.tensor(torch.inf))
    assert not u_centered_gram(x).any()


def test_features_stay_as_they_are():
    x = draw(0, 6, 4).requires_grad_()
    before = x.detach().clone()
    assert not u_centered_gram(x).requires_grad
    assert torch.equal(x, before)
