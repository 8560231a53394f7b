"""FGD against its equations in NumPy, object by object and position by position."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pcka import losses
from pcka.losses import Outputs, fgd_loss, fgd_relation_loss
from pcka.losses.fgd import GlobalContext
from pcka.losses.foreground import foreground_scale

B, C, H, W = 2, 3, 4, 6
# Two that overlap in the first image, and nothing in the second.
BOXES = torch.tensor([[0, 0.1, 0.1, 0.7, 0.8], [0, 0.4, 0.3, 0.95, 0.45]], dtype=torch.float64)
SETTINGS = {"foreground": 0.5, "background": 0.2, "attention": 0.3, "temperature": 0.7}


def _size(x):
    """``abs`` that a complex step goes through."""
    return np.where(x.real < 0, -x, x)


def _scale(boxes, batch, height, width):
    """``1 / (H_r W_r)`` of the smallest object at each position, else 0."""
    scale = np.zeros((batch, height, width))
    for image, x0, y0, x1, y1 in boxes:
        rows = range(math.floor(y0 * height), math.ceil(y1 * height))
        columns = range(math.floor(x0 * width), math.ceil(x1 * width))
        for i in rows:
            for j in columns:
                here = scale[int(image), i, j]
                scale[int(image), i, j] = max(here, 1 / (len(rows) * len(columns)))
    return scale


def _softmax(x):
    return np.exp(x) / np.exp(x).sum()


def _attention(x, temperature):
    """Of one image ``(C, H, W)``: over positions, and over channels."""
    places = H * W * _softmax(_size(x).mean(0).ravel() / temperature)
    return places.reshape(H, W), C * _softmax(_size(x).mean((1, 2)) / temperature)


def _fgd(student, teacher, foreground, background, attention, temperature):
    total, scale = 0, _scale(BOXES.numpy(), B, H, W)
    for b in range(B):
        places, channels = _attention(teacher[b], temperature)
        own_places, own_channels = _attention(student[b], temperature)
        empty = (scale[b] == 0).sum()
        for k, i, j in np.ndindex(C, H, W):
            weight = foreground * scale[b, i, j] + background * (scale[b, i, j] == 0) / empty
            square = (teacher[b, k, i, j] - student[b, k, i, j]) ** 2
            total += weight * places[i, j] * channels[k] * square
        apart = _size(places - own_places).sum() + _size(channels - own_channels).sum()
        total += attention * apart
    return total / B


def test_value_and_gradient_of_the_equation(draw, meets_numpy):
    meets_numpy(
        lambda s, t: fgd_loss(s, t, BOXES, **SETTINGS),
        lambda s, t: _fgd(s, t, **SETTINGS),
        draw(0, B, C, H, W),
        draw(1, B, C, H, W),
    )


def _context(x, block):
    """``R(X)`` by the block's parameters."""
    where, first, norm, last = (
        {name: p.detach().numpy() for name, p in layer.named_parameters()}
        for layer in (block.where, block.shift[0], block.shift[1], block.shift[3])
    )
    out = np.empty_like(x)
    for b, image in enumerate(x):
        columns = image.reshape(image.shape[0], -1)
        weights = _softmax(where["weight"][0, :, 0, 0] @ columns + where["bias"])
        hidden = first["weight"] @ (columns @ weights) + first["bias"]
        spread = np.sqrt(((hidden - hidden.mean()) ** 2).mean() + 1e-5)
        hidden = (hidden - hidden.mean()) / spread * norm["weight"] + norm["bias"]
        hidden = np.where(hidden.real > 0, hidden, 0)
        out[b] = image + (last["weight"] @ hidden + last["bias"])[:, None, None]
    return out


def test_relation_has_value_and_gradient_of_the_equation(draw, meets_numpy):
    torch.manual_seed(0)
    blocks = [GlobalContext(8).double() for _ in range(2)]
    for block in blocks:
        torch.nn.init.normal_(block.shift[-1].weight)
    own, other = blocks
    meets_numpy(
        lambda s, t: fgd_relation_loss(own(s), other(t)),
        lambda s, t: ((_context(s, own) - _context(t, other)) ** 2).sum() / B,
        draw(0, B, 8, 3, 2),
        draw(1, B, 8, 3, 2),
    )


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 1), (13, 20)])
def test_objects_weigh_one_over_the_positions_that_they_touch(height, width):
    expected = _scale(BOXES.numpy(), B, height, width)
    found = foreground_scale(BOXES, B, (height, width))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert found[0].max() > 0
    assert found[1].max() == 0


@pytest.mark.parametrize("box", [(0.5, 0.5, 0.5, 0.5), (1.0, 1.0, 1.0, 1.0), (-0.2, 0.1, 0.0, 0.1)])
def test_an_object_without_extent_touches_one_position(box):
    found = foreground_scale(torch.tensor([[0, *box]]), 1, (4, 4))
    assert (found == 1).sum() == 1
    assert found.sum() == 1


def test_images_without_objects_are_background(draw):
    student, teacher = draw(0, B, C, H, W), draw(1, B, C, H, W)
    none = torch.zeros(0, 5)
    expected = fgd_loss(student, teacher, none, **SETTINGS | {"foreground": 9.0})
    assert fgd_loss(student, teacher, none, **SETTINGS) == expected
    whole = torch.tensor([[b, 0.0, 0.0, 1.0, 1.0] for b in range(B)])
    expected = fgd_loss(student, teacher, whole, **SETTINGS | {"background": 9.0})
    assert fgd_loss(student, teacher, whole, **SETTINGS) == expected


def test_the_defaults_are_the_authors_for_retinanet():
    given = losses.defaults("FGD")
    names = ("foreground", "background", "attention", "relation", "temperature")
    assert [given[name] for name in names] == [1e-3, 5e-4, 5e-4, 5e-6, 0.5]


def test_a_context_starts_as_the_authors_do():
    torch.manual_seed(0)
    block = GlobalContext(512)
    assert block.where.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.1)
    assert not block.where.bias.any()
    x = torch.randn(2, 512, 3, 3)
    assert torch.equal(block(x), x)


def _pair(draw):
    return [Outputs(features={"p3": draw(seed, B, 4, H, W)}) for seed in (0, 1)]


def test_the_module_weighs_both_terms_of_a_level(draw):
    student, teacher = _pair(draw)
    loss = losses.build("FGD", stages=["p3"], weights=2.0, relation=0.1, **SETTINGS)
    loss.prepare(student, teacher)
    own, other = student.features["p3"], teacher.features["p3"]
    terms = loss(student, teacher, BOXES)
    assert terms.keys() == {"loss_fgd_p3", "loss_fgd_p3_relation"}
    assert terms["loss_fgd_p3"] == 2 * fgd_loss(own, other, BOXES, **SETTINGS)
    # The last layers start at 0: both maps are related to nothing yet.
    expected = 2 * 0.1 * fgd_relation_loss(own, other)
    torch.testing.assert_close(terms["loss_fgd_p3_relation"], expected)


def test_without_the_relation_nothing_is_made_for_it(draw):
    student, teacher = _pair(draw)
    loss = losses.build("FGD", stages=["p3"], relation=0.0)
    loss.prepare(student, teacher)
    assert not list(loss.parameters())
    assert loss(student, teacher, BOXES).keys() == {"loss_fgd_p3"}


@pytest.mark.parametrize("target", [torch.zeros(3), torch.zeros(3, 4), torch.arange(3)])
def test_a_target_that_is_no_boxes_is_refused(draw, target):
    with pytest.raises(ValueError, match=r"target must hold the objects' boxes, \(M, 5\)"):
        losses.build("FGD", stages=["p3"], relation=0.0)(*_pair(draw), target)


def test_a_missing_target_is_refused(draw):
    with pytest.raises(ValueError, match="target: FGD needs it, got None"):
        losses.build("FGD", stages=["p3"])(*_pair(draw), None)
