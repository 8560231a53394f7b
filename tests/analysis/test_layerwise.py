from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pcka import cka
from pcka.analysis import LayerwiseCKA, layerwise_cka


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


def numpy_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased HSIC by U-centering (Szekely and Rizzo 2014), not by Song's formula."""
    n = len(x)

    def u_centered(z: np.ndarray) -> np.ndarray:
        k = z @ z.T
        np.fill_diagonal(k, 0)
        rows = k.sum(1)
        k = k - rows[:, None] / (n - 2) - rows[None] / (n - 2) + k.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(k, 0)
        return k

    return (u_centered(x) * u_centered(y)).sum() / (n * (n - 3))


def test_ratio_of_the_sums_over_batches():
    batches = [(draw(i, n, 2, 3) + 4, draw(10 + i, n, 5)) for i, n in enumerate((8, 8, 5))]
    result = LayerwiseCKA()
    for x, y in batches:
        result.update({"a": x}, {"a": y})
    flat = [(x.flatten(1).numpy(), y.numpy()) for x, y in batches]
    kl = sum(numpy_hsic(x, y) for x, y in flat)
    kk = sum(numpy_hsic(x, x) for x, _ in flat)
    ll = sum(numpy_hsic(y, y) for _, y in flat)
    assert result.compute() == pytest.approx({"a": kl / np.sqrt(kk * ll)}, rel=1e-10)


def test_one_batch_is_unbiased_cka():
    x, y = draw(0, 12, 6), draw(1, 12, 4)
    result = LayerwiseCKA()
    result.update({"a": x}, {"a": y})
    expected = cka(x, y, unbiased=True).item()
    assert result.compute()["a"] == pytest.approx(expected, rel=1e-10)


def test_noise_is_not_alike_however_small_the_batch():
    result = LayerwiseCKA()
    for i in range(60):
        result.update({"a": draw(2 * i, 6, 512)}, {"a": draw(2 * i + 1, 6, 512)})
    assert abs(result.compute()["a"]) < 0.1


def test_a_layer_is_like_its_rotation():
    x = draw(0, 16, 6)
    rotation = torch.linalg.qr(draw(1, 6, 6)).Q
    result = LayerwiseCKA()
    result.update({"a": x}, {"a": 3 * x @ rotation + 7})
    assert result.compute()["a"] == pytest.approx(1, rel=1e-10)


def test_a_large_mean_costs_no_digits():
    x, y = draw(0, 16, 6), draw(1, 16, 6)
    plain, shifted = LayerwiseCKA(), LayerwiseCKA()
    plain.update({"a": x}, {"a": y})
    shifted.update({"a": x.float() + 100}, {"a": y.float() + 100})
    assert shifted.compute()["a"] == pytest.approx(plain.compute()["a"], abs=1e-4)


def test_a_constant_layer_is_like_nothing():
    result = LayerwiseCKA()
    result.update({"a": torch.ones(8, 3)}, {"a": draw(0, 8, 3)})
    assert result.compute() == {"a": 0.0}


def test_a_batch_too_small_is_passed_over():
    x, y = draw(0, 8, 3), draw(1, 8, 3)
    result = LayerwiseCKA()
    result.update({"a": x[:3]}, {"a": y[:3]})
    with pytest.raises(ValueError, match="no batch of at least 4 samples"):
        result.compute()
    result.update({"a": x}, {"a": y})
    assert result.compute()["a"] == pytest.approx(cka(x, y, unbiased=True).item(), rel=1e-10)


def test_refusals():
    with pytest.raises(ValueError, match=r"same layers; got student \['a'\] and teacher \['b'\]"):
        LayerwiseCKA().update({"a": draw(0, 8, 3)}, {"b": draw(0, 8, 3)})
    with pytest.raises(ValueError, match="a: student and teacher must hold the same samples"):
        LayerwiseCKA().update({"a": draw(0, 8, 3)}, {"a": draw(0, 7, 3)})


def test_models_are_compared_in_eval_mode_and_left_as_they_were():
    def net(width: int) -> nn.Sequential:
        torch.manual_seed(width)
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten()).double()

    student, teacher = net(4).train(), net(6).eval()
    student[2].eval()
    batches = [draw(i, 8, 3, 5, 5) for i in range(3)]
    result = layerwise_cka(student, teacher, batches, {"a": ("1", "1"), "b": ("2", "0")})
    modes = [module.training for module in student]
    assert student.training and modes == [True, True, False]
    assert student[1].num_batches_tracked == 0
    assert not any(module._forward_hooks for module in (*student, *teacher))

    expected = LayerwiseCKA()
    student.eval()
    for images in batches:
        x, y = student[:2](images), teacher[0](images)
        expected.update({"a": x, "b": x}, {"a": teacher[1](y), "b": y})
    assert result == pytest.approx(expected.compute(), rel=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_network_of_no_finite_values_is_like_none(bad):
    """Not 0, which is the figure of layers that have nothing in common."""
    result = LayerwiseCKA()
    result.update(
        {"a": draw(0, 8, 4) * bad, "b": draw(0, 8, 4)}, dict.fromkeys("ab", draw(1, 8, 5))
    )
    found = result.compute()
    assert np.isnan(found["a"]) and np.isfinite(found["b"])
