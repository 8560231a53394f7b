"""CrossKD: what goes through the teacher's layers, and what is trained by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pcka import losses
from pcka.losses import Outputs, dense_boxes_loss, dense_scores_loss
from pcka.losses.crosskd import at_scale
from pcka.losses.heads import Dense, DenseHead

B, K, SIZES = 2, 3, ((4, 3), (2, 2))


class Rest(nn.Module):
    """The last layers of a teacher's head, of four channels; boxes are sizes around the origin."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cls, self.box = (nn.Conv2d(4, n, 1, dtype=torch.float64) for n in (K, 2))
        self.requires_grad_(False)

    def forward(self, inner):
        logits, sizes = (
            torch.cat([layer(x).flatten(2).mT for x in inner[branch]], 1)
            for branch, layer in (("cls", self.cls), ("box", self.box))
        )
        return Dense(logits, torch.cat([-sizes.exp(), sizes.exp()], -1))


def _head(draw, seed, width, rest=None):
    inner = {
        branch: [draw(seed + 2 * i + j, B, width, *size) for j, size in enumerate(SIZES)]
        for i, branch in enumerate(("cls", "box"))
    }
    predictions = rest(inner) if rest else None
    return Outputs(head=DenseHead(predictions, inner, rest))


@pytest.fixture
def teacher(draw):
    return _head(draw, 20, 4, Rest())


def test_the_students_maps_go_through_the_teachers_layers(draw, teacher):
    student = _head(draw, 0, 4)
    loss = losses.build("CROSSKD", cls_weight=2.0, box_weight=0.5, depth=1)
    loss.prepare(student, teacher)
    assert not list(loss.parameters())  # of one width
    terms = loss(student, teacher, None)
    inner = {
        branch: [at_scale(x, y) for x, y in zip(maps, teacher.head.inner[branch])]
        for branch, maps in student.head.inner.items()
    }
    crossed, own = teacher.head.rest(inner), teacher.head.predictions
    assert terms == {
        "loss_crosskd_cls": 2 * dense_scores_loss(crossed.logits, own.logits, beta=1.0),
        "loss_crosskd_box": 0.5 * dense_boxes_loss(crossed.boxes, own.boxes, own.logits),
    }


def test_the_defaults_are_the_authors_for_retinanet():
    expected = {"cls_weight": 1.0, "box_weight": 1.0, "depth": 3, "beta": 1.0}
    assert losses.defaults("CROSSKD") == expected


def test_maps_cross_at_the_teachers_scale(draw, meets_numpy):
    def numpy_at_scale(s, t):
        over = {"axis": (0, 2, 3), "keepdims": True}
        unit = (s - s.mean(**over)) / np.sqrt(((s - s.mean(**over)) ** 2).mean(**over))
        return unit * np.sqrt(((t - t.mean(**over)) ** 2).mean(**over)) + t.mean(**over)

    student, teacher = 5 + 3 * draw(0, B, 3, 2, 2), draw(1, B, 3, 2, 2)
    meets_numpy(
        lambda s, t: at_scale(s, t).sin().sum(),
        lambda s, t: np.sin(numpy_at_scale(s, t)).sum(),
        student,
        teacher,
    )


@pytest.mark.parametrize("size", [(1, 1), (2, 3)])
def test_a_channel_without_variation_becomes_the_teachers_mean(draw, size):
    student, teacher = torch.full((1, 2, *size), 7.0, requires_grad=True), draw(0, 1, 2, *size)
    found = at_scale(student, teacher)
    found.square().sum().backward()
    expected = teacher.mean((2, 3), keepdim=True).float().expand_as(found)
    torch.testing.assert_close(found, expected)
    assert student.grad.isfinite().all()


def test_the_teachers_own_maps_cost_nothing(teacher):
    loss = losses.build("CROSSKD")
    terms = loss(replace(teacher, head=replace(teacher.head, rest=None)), teacher, None)
    assert sum(terms.values()).item() == pytest.approx(0, abs=1e-9)


def test_another_width_is_adapted_in_each_branch_for_all_levels(draw, teacher):
    student = _head(draw, 0, 6)
    loss = losses.build("CROSSKD")
    loss.prepare(student, teacher)
    shapes = {name: tuple(p.shape) for name, p in loss.named_parameters()}
    assert shapes == {
        "adapters.cls.0.weight": (4, 6, 1, 1), "adapters.cls.0.bias": (4,),
        "adapters.box.0.weight": (4, 6, 1, 1), "adapters.box.0.bias": (4,),
    }  # fmt: skip
    maps = [x.requires_grad_() for branch in student.head.inner.values() for x in branch]
    sum(loss(student, teacher, None).values()).backward()
    assert all(x.grad.norm() > 0 for x in (*maps, *loss.parameters()))
    assert all(p.grad is None for p in teacher.head.rest.parameters())


def test_a_branch_that_nothing_comes_back_through_has_no_idle_parameters(draw, teacher):
    student = _head(draw, 0, 6)
    loss = losses.build("CROSSKD", box_weight=0.0)
    loss.prepare(student, teacher)
    terms = loss(student, teacher, None)
    terms["loss_crosskd_cls"].backward()
    assert terms.keys() == {"loss_crosskd_cls"}
    assert list(loss.adapters) == ["cls"]
    assert all(p.grad is not None for p in loss.parameters())


def test_heads_of_other_levels_are_refused_before_the_training(draw, teacher):
    student = _head(draw, 0, 4)
    one_level = {branch: maps[:1] for branch, maps in student.head.inner.items()}
    student = Outputs(head=DenseHead(None, one_level))
    with pytest.raises(ValueError, match="have 1 and 2 levels; both heads need the same levels"):
        losses.build("CROSSKD").prepare(student, teacher)


def test_other_classes_are_refused_before_the_training(draw, teacher):
    student = _head(draw, 0, 4)
    own = replace(teacher.head.predictions, logits=teacher.head.predictions.logits[..., :2])
    teacher = Outputs(head=replace(teacher.head, predictions=own))
    with pytest.raises(ValueError, match="need the same levels, anchors and classes"):
        losses.build("CROSSKD").prepare(student, teacher)


@pytest.mark.parametrize("depth", [0, -1, 1.5])
def test_a_depth_is_a_number_of_convolutions(depth):
    with pytest.raises(ValueError, match="depth must be a positive number of convolutions, got"):
        losses.build("CROSSKD", depth=depth)
