from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pcka.losses.adapters import (
    PooledLinear,
    adapt,
    fit,
    pointwise,
    prepared,
    regressor,
)


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [
        ((2, 3, 8, 8), (2, 5, 8, 8), (1, 1)),
        ((2, 3, 8, 6), (2, 5, 4, 3), (3, 3)),  # twice the sides: stride 2
        ((2, 3, 4, 3), (2, 5, 8, 6), (4, 4)),  # half of them: transposed
        ((2, 3, 3, 2), (2, 5, 9, 6), (6, 6)),
        ((2, 3, 2, 3), (2, 5, 8, 12), (8, 8)),
        ((2, 3, 7, 9), (2, 5, 4, 9), (4, 1)),
    ],
)
def test_regressor_gives_the_teachers_shape(student, teacher, kernel):
    made = regressor(student, teacher)
    assert made[0].kernel_size == kernel
    y = made(torch.randn(student))
    assert y.shape == teacher
    # Batch norm, then ReLU: about half of a standard normal is cut off.
    assert y.min() == 0
    assert 0.2 < (y > 0).float().mean() < 0.8


@pytest.mark.parametrize("student", [(2, 3, 5, 8), (2, 3, 8, 5), (2, 3, 3, 3), (2, 3, 4, 8)])
def test_a_smaller_student_is_refused_unless_by_a_whole_factor(student):
    told = r"or smaller by a whole factor; got student .* teacher \(2, 5, 8, 8"
    with pytest.raises(ValueError, match=told):
        regressor(student, (2, 5, 8, 8))


def test_what_is_no_map_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"student must be a feature map \(B, C, H, W\), got \(2, "
    ):
        regressor((2, 3), (2, 5, 8, 8))
    with pytest.raises(ValueError, match=r"teacher must be a feature map"):
        regressor((2, 3, 8, 8), (2, 5))


def test_pointwise_layers():
    def kinds(made):
        return [type(layer) for layer in made]

    assert kinds(pointwise(3, 5)) == [nn.Conv2d]
    assert pointwise(3, 5)[0].weight.shape == (5, 3, 1, 1)
    assert pointwise(3, 5)[0].bias is not None
    assert pointwise(3, 5, bias=False)[0].bias is None
    assert kinds(pointwise(3, 5, norm=True, relu=True)) == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert pointwise(3, 5, norm=True)[0].bias is None  # batch norm has one


def test_pooled_linear_of_maps_is_that_of_their_means(draw):
    layer = PooledLinear(3, 7).double()
    x = draw(0, 2, 3, 4, 5)
    torch.testing.assert_close(layer(x), layer(x.mean((2, 3))))
    weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
    expected = np.mean(x.numpy(), axis=(2, 3)) @ weight.T + bias
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("feature", "parameters"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_fit_takes_full_precision(feature, parameters):
    assert fit(pointwise(3, 5), torch.zeros(1, dtype=feature))[0].weight.dtype == parameters
    assert fit(pointwise(3, 5), torch.zeros(1, device="meta"))[0].weight.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_adapt_takes_any_dtype_in_and_out_of_autocast(draw, dtype):
    adapter = pointwise(3, 5)
    x = draw(0, 2, 3, 4, 4).to(dtype)
    y = adapt(adapter, x)
    assert y.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert adapt(adapter, x).dtype == torch.bfloat16
    torch.testing.assert_close(adapt(adapter.double(), x).float(), y)


@pytest.mark.parametrize("module", [None, nn.ModuleDict()])
def test_what_was_not_prepared_names_the_loss_and_the_way_out(module):
    with pytest.raises(RuntimeError, match=r"FitNet is not prepared.*Call Distiller\.prepare"):
        prepared(module, "FitNet")
    layer = pointwise(3, 5)
    assert prepared(layer, "FitNet") is layer
