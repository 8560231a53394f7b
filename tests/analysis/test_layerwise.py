from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pcka import cka
from pcka.analysis import MinibatchCKA, cka_matrix, layerwise_cka, u_centered_gram


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


def measure(*batches: tuple[torch.Tensor, torch.Tensor]) -> float:
    """CKA of one layer with one layer."""
    result = MinibatchCKA("x", "y")
    for x, y in batches:
        result.update({"x": u_centered_gram(x)}, {"y": u_centered_gram(y)})
    return result.compute().values.item()


def test_ratio_of_the_sums_over_batches():
    batches = [(draw(i, n, 2, 3) + 4, draw(10 + i, n, 5)) for i, n in enumerate((8, 8, 5))]
    flat = [(x.flatten(1).numpy(), y.numpy()) for x, y in batches]
    kl = sum(numpy_hsic(x, y) for x, y in flat)
    kk = sum(numpy_hsic(x, x) for x, _ in flat)
    ll = sum(numpy_hsic(y, y) for _, y in flat)
    assert measure(*batches) == pytest.approx(kl / np.sqrt(kk * ll), rel=1e-10)


def test_one_batch_is_unbiased_cka():
    x, y = draw(0, 12, 6), draw(1, 12, 4)
    assert measure((x, y)) == pytest.approx(cka(x, y, unbiased=True).item(), rel=1e-10)


def test_noise_is_not_alike_however_small_the_batch():
    noise = [(draw(2 * i, 6, 512), draw(2 * i + 1, 6, 512)) for i in range(60)]
    assert abs(measure(*noise)) < 0.1


def test_a_layer_is_like_its_rotation():
    x = draw(0, 16, 6)
    rotation = torch.linalg.qr(draw(1, 6, 6)).Q
    assert measure((x, 3 * x @ rotation + 7)) == pytest.approx(1, rel=1e-10)


def test_a_large_mean_costs_no_digits():
    x, y = draw(0, 16, 6), draw(1, 16, 6)
    shifted = measure((x.float() + 100, y.float() + 100))
    assert shifted == pytest.approx(measure((x, y)), abs=1e-4)


def test_a_constant_layer_is_like_nothing():
    assert measure((torch.ones(8, 3), draw(0, 8, 3))) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_layer_of_no_finite_values_is_like_none(bad):
    """Not 0, which is the figure of layers that have nothing in common."""
    result = MinibatchCKA("ab", "c")
    grams = {"a": u_centered_gram(draw(0, 8, 4) * bad), "b": u_centered_gram(draw(0, 8, 4))}
    result.update(grams, {"c": u_centered_gram(draw(1, 8, 5))})
    (of_a,), (of_b,) = result.compute().values
    assert of_a.isnan() and of_b.isfinite()


def test_a_batch_too_small_is_passed_over():
    x, y = draw(0, 8, 3), draw(1, 8, 3)
    with pytest.raises(ValueError, match="no batch of at least 4 samples"):
        measure((x[:3], y[:3]))
    expected = cka(x, y, unbiased=True).item()
    assert measure((x[:3], y[:3]), (x, y)) == pytest.approx(expected, rel=1e-10)


def test_all_layers_are_compared_with_all():
    """Each entry is what the two layers alone give; rows are of the first model."""
    a = {name: draw(i, 9, 4 + i) for i, name in enumerate("pqr")}
    b = {name: draw(7 + i, 9, 3 + i) for i, name in enumerate("st")}
    result = MinibatchCKA(a, b)
    result.update(*({name: u_centered_gram(x) for name, x in side.items()} for side in (a, b)))
    table = result.compute()
    assert (table.layers_a, table.layers_b) == (("p", "q", "r"), ("s", "t"))
    expected = [[measure((x, y)) for y in b.values()] for x in a.values()]
    torch.testing.assert_close(table.values, torch.tensor(expected, dtype=torch.float64))


def test_a_layer_of_other_samples_is_named():
    result = MinibatchCKA("a", "b")
    with pytest.raises(ValueError, match=r"layer 'b': expected .* same 8 samples .* got 7 rows"):
        result.update({"a": u_centered_gram(draw(0, 8, 3))}, {"b": u_centered_gram(draw(0, 7, 3))})
    with pytest.raises(ValueError, match="layers: expected one or more of each model"):
        MinibatchCKA("a", [])


def net(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    layers = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Flatten()
    return nn.Sequential(*layers).double()


def test_matrix_of_two_models_in_one_pass():
    """Layers, values and modes; the batch norm's output is read before the ReLU changes it."""
    a, b = net(4).train(), net(6)
    b[3].eval()
    batches = [(draw(i, 8, 3, 5, 5), "label") for i in range(3)]
    table = cka_matrix(a, b, iter(batches))
    assert table.layers_a == table.layers_b == ("0", "1", "2")
    assert a.training and [module.training for module in b] == [True, True, True, False]
    assert a[1].num_batches_tracked == 0
    assert not any(module._forward_hooks for module in (*a, *b))

    a.eval(), b.eval()
    ends = [net(width)[:2].eval() for width in (4, 6)]  # a batch norm that nothing changes
    pairs = [(a[:1](x), ends[1](x)) for x, _ in batches]
    assert table.values[0, 1].item() == pytest.approx(measure(*pairs), rel=1e-9)
    pairs = [(a(x), b[:1](x)) for x, _ in batches]
    assert table.values[2, 0].item() == pytest.approx(measure(*pairs), rel=1e-9)


def test_matrix_of_a_model_with_itself_is_symmetric_and_runs_it_once():
    model, runs = net(4), []
    model.register_forward_hook(lambda *_: runs.append(1))
    table = cka_matrix(model, model, [draw(0, 8, 3, 5, 5)], layers_a="[012]")
    assert len(runs) == 3  # two of them look for the layers
    torch.testing.assert_close(table.values, table.values.T)
    torch.testing.assert_close(table.values.diagonal(), torch.ones(3, dtype=torch.float64))
    other = cka_matrix(model, model, [draw(0, 8, 3, 5, 5)], ["1"], ["2", "0"])
    torch.testing.assert_close(other.values, table.values[1:2, [2, 0]])


def test_one_model_may_be_a_part_of_the_other():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    batches = [torch.randn(16, 6)]
    found = layerwise_cka(
        nn.Sequential(inner, nn.Linear(5, 3)), inner, batches, {"l": ("0.0", "0")}
    )
    assert found["l"] == pytest.approx(1)
    assert layerwise_cka(inner, inner, batches, {"last": "1"})["last"] == pytest.approx(1)


def test_matrix_begins_with_the_first_batch_that_is_large_enough():
    whole = draw(0, 8, 3, 5, 5)
    table = cka_matrix(net(4), net(6), [whole[:2], whole, whole[:3]])
    torch.testing.assert_close(table.values, cka_matrix(net(4), net(6), [whole]).values)


def test_refusals_of_the_matrix():
    with pytest.raises(ValueError, match="batches: expected one of at least 4 samples, got none"):
        cka_matrix(net(4), net(6), [draw(0, 3, 3, 5, 5)])
    with pytest.raises(ValueError, match=r"batches: expected tensors.*got dict"):
        cka_matrix(net(4), net(6), [{"images": draw(0, 8, 3, 5, 5)}])
    with pytest.raises(ValueError, match="Sequential has no module 'layer1'"):
        cka_matrix(net(4), net(6), [draw(0, 8, 3, 5, 5)], layers_b=["layer1"])


def test_models_are_compared_in_eval_mode_and_left_as_they_were():
    student, teacher = net(4)[:2].append(nn.Flatten()).train(), net(6)[:2].eval()
    student[2].eval()
    batches = [draw(i, 8, 3, 5, 5) for i in range(3)]
    result = layerwise_cka(student, teacher, batches, {"a": ("1", "1"), "b": ("2", "0")})
    modes = [module.training for module in student]
    assert student.training and modes == [True, True, False]
    assert student[1].num_batches_tracked == 0
    assert not any(module._forward_hooks for module in (*student, *teacher))

    student.eval()
    of_student = [student[:2](images) for images in batches]
    of_teacher = [(teacher[0](images), teacher[:2](images)) for images in batches]
    expected = {
        "a": measure(*((x, y) for x, (_, y) in zip(of_student, of_teacher))),
        "b": measure(*((x, y) for x, (y, _) in zip(of_student, of_teacher))),
    }
    assert result == pytest.approx(expected, rel=1e-10)
