"""OFD against its formulas written in NumPy, and on the models that it has to work with."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from classification.models import create_model
from classification.models.taps import model_taps
from pcka import Distiller, losses
from pcka.losses import Context, Outputs, ofd_loss
from pcka.losses.ofd import ofd_margin

NORM = torch.tensor([0.8, -1.2, 0.5]).double(), torch.tensor([0.3, -0.4, 0.0]).double()


def negative_mean(mean, std):
    """E[x | x < 0] of a normal distribution, by summing over its density."""
    x = np.linspace(mean - 12 * std, min(0.0, mean + 12 * std), 2_000_001)
    density = np.exp(-((x - mean) ** 2) / (2 * std**2))
    return np.sum(x * density) / np.sum(density)


def partial_distance(student, teacher, margin):
    """The loss, value by value."""
    total = 0.0
    for index in np.ndindex(student.shape):
        target = max(teacher[index], margin[index[1]])
        if target > 0 or student[index] > target:
            total += (student[index] - target) ** 2
    return total / len(student)


def outputs(draw, seed, shapes):
    return Outputs(
        features={name: draw(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    )


def prepared(draw, student_shapes, teacher_shapes, **keywords):
    """A loss of the named stages, both models' outputs, with batch norms at rest."""
    student, teacher = outputs(draw, 0, student_shapes), outputs(draw, 20, teacher_shapes)
    loss = losses.OFD(stages=tuple(student_shapes), **keywords)
    torch.manual_seed(0)
    loss.prepare(student, teacher, Context(teacher_norms=dict.fromkeys(student_shapes, NORM)))
    return loss.eval(), student, teacher


@pytest.mark.parametrize(("weight", "bias"), [(1.0, 0.0), (0.7, 0.9), (-0.7, 0.9), (0.4, -1.5)])
def test_margin_is_the_mean_of_the_negative_values(weight, bias):
    margin = ofd_margin(torch.tensor([weight]).double(), torch.tensor([bias]).double())
    assert margin.item() == pytest.approx(negative_mean(bias, abs(weight)), rel=1e-5)


def test_margin_of_a_channel_that_is_hardly_ever_negative():
    bias = torch.tensor([3.05, 3.2]).double()  # 0.00114 and 0.00069 of the values are negative
    margin = ofd_margin(torch.tensor([1.0, -1.0]).double(), bias)
    assert margin[0].item() == pytest.approx(negative_mean(3.05, 1.0), rel=1e-5)
    assert margin[1].item() == -3.0


def test_margin_of_a_constant_channel_is_finite():
    bias = torch.tensor([-0.5, 0.0, 0.5])
    assert ofd_margin(torch.zeros(3), bias).tolist() == pytest.approx([-0.5, 0.0, 0.0], abs=1e-6)


def test_loss_is_the_partial_distance_over_the_samples(draw):
    student, teacher = draw(0, 3, 4, 5, 2), draw(1, 3, 4, 5, 2)
    margin = -draw(2, 4).abs()
    expected = partial_distance(student.numpy(), teacher.numpy(), margin.numpy())
    assert ofd_loss(student, teacher, margin).item() == pytest.approx(expected, rel=1e-12)


def test_gradient(draw):
    student, teacher = draw(0, 2, 3, 4, 2).requires_grad_(), draw(1, 2, 3, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ofd_loss(x, teacher, -NORM[0].abs()), student)
    ofd_loss(student, teacher, -NORM[0].abs()).backward()
    assert teacher.grad is None
    # Below a negative target nothing is asked of the student.
    target = torch.maximum(teacher, -NORM[0].abs()[:, None, None])
    free = (target <= 0) & (student <= target)
    assert free.any()
    assert student.grad[free].count_nonzero() == 0


def test_module_halves_each_stage_before_the_last(draw):
    shapes = {name: (2, 4, 6, 6) for name in ("a", "b", "c")}
    wide = {name: (2, 3, 6, 6) for name in shapes}
    loss, student, teacher = prepared(draw, shapes, wide, weight=0.4)
    terms = loss(student, teacher, None)
    assert list(terms) == ["loss_ofd_a", "loss_ofd_b", "loss_ofd_c"]
    for name, factor in {"a": 0.1, "b": 0.2, "c": 0.4}.items():
        kernel = loss.connectors[name].layers[0].weight.detach()[:, :, 0, 0].numpy()
        x = np.einsum("oi,bihw->bohw", kernel, student.features[name].numpy())
        x /= math.sqrt(1 + 1e-5)  # a batch norm that has seen nothing yet
        margin = [negative_mean(b, abs(w)) for w, b in zip(*(v.tolist() for v in NORM))]
        expected = factor * partial_distance(x, teacher.features[name].numpy(), margin)
        assert terms[f"loss_ofd_{name}"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("side_s", "side_t"), [(2, 4), (4, 2), (3, 8)])
def test_larger_map_is_pooled(draw, side_s, side_t):
    loss, student, teacher = prepared(
        draw, {"a": (2, 4, side_s, side_s)}, {"a": (2, 3, side_t, side_t)}, weight=1.0
    )
    side = min(side_s, side_t)
    pooled = [
        nn.functional.adaptive_avg_pool2d(side_of.features["a"], side)
        for side_of in (student, teacher)
    ]
    expected = ofd_loss(loss.connectors["a"].layers(pooled[0]), pooled[1], ofd_margin(*NORM))
    torch.testing.assert_close(loss(student, teacher, None)["loss_ofd_a"], expected)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("MobileNetV2", "vgg13"), ("ShuffleV1", "wrn_40_2"), ("resnet8x4", "resnet32x4")],
)
def test_models_of_unlike_sizes(student, teacher):
    models = [create_model(name, 5) for name in (student, teacher)]
    taps = model_taps(*models, [])
    stages = [tap for tap in taps if re.fullmatch(r"stage[1-9]_preact", tap)]
    norms = dict(zip(models[1].preactivation_names, models[1].preactivation_norms))
    modules = {stage: models[1].get_submodule(norms[taps[stage][1]]) for stage in stages}
    context = Context(teacher_norms={tap: (bn.weight, bn.bias) for tap, bn in modules.items()})
    distiller = Distiller(*models, [losses.OFD(stages=stages)], taps)
    images = torch.randn(2, 3, 32, 32)
    distiller.prepare(images, context=context)
    terms = distiller(images, torch.tensor([0, 1]))
    sum(terms.values()).backward()
    assert len(terms) == len(stages) >= 3
    assert all(term.isfinite() and term > 0 for term in terms.values())
    assert all(p.grad.norm() > 0 for p in distiller.losses.parameters())


def test_margins_are_saved_with_the_connectors(draw):
    loss, _, _ = prepared(draw, {"a": (2, 4, 6, 6)}, {"a": (2, 3, 6, 6)})
    torch.testing.assert_close(loss.state_dict()["connectors.a.margin"], ofd_margin(*NORM))
    assert not loss.connectors["a"].margin.requires_grad


def test_refusals(draw):
    student, teacher = (Outputs(features={"a": draw(i, 2, 3, 4, 4)}) for i in range(2))
    loss = losses.OFD(stages=("a",))
    with pytest.raises(
        ValueError, match=r"teacher_norms: .* margin of 'a' .*norms are known for \['b'\]"
    ):
        loss.prepare(student, teacher, Context(teacher_norms={"b": NORM}))
    with pytest.raises(ValueError, match=r"norm of 'a' must have .* 3 channels, got \(2,\)"):
        loss.prepare(student, teacher, Context(teacher_norms={"a": (NORM[0][:2], NORM[1])}))
    with pytest.raises(RuntimeError, match=r"Distiller\.prepare"):
        loss(student, teacher, None)
    with pytest.raises(ValueError, match="teacher: OFD needs it"):
        loss.prepare(student, None)
    with pytest.raises(ValueError, match="must be feature maps"):
        flat = Outputs(features={"a": draw(0, 2, 3)})
        loss.prepare(flat, teacher, Context(teacher_norms={"a": NORM}))
    with pytest.raises(ValueError, match=r"margin must hold one value .* 3 channels, got \(2,\)"):
        ofd_loss(student.features["a"], teacher.features["a"], torch.zeros(2))
    with pytest.raises(ValueError, match="one shape"):
        ofd_loss(draw(0, 2, 3, 4, 4), draw(1, 2, 4, 4, 4), torch.zeros(3))
