"""ReviewKD against its formulas written in NumPy: the context loss, and the chain of fusions."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from classification.models import create_model
from classification.models.taps import model_taps
from pcka import Distiller, losses
from pcka.losses import Outputs, hcl_loss

UNSEEN = math.sqrt(1 + 1e-5)  # a batch norm that has seen nothing yet divides by this


def pool(x, side):
    """Averages over the cells of a grid, which may overlap: cell i is [floor, ceil) of i * H/n."""
    height, width = x.shape[2:]
    cells = np.empty((*x.shape[:2], side, side))
    for i in range(side):
        for j in range(side):
            rows = slice(i * height // side, -(-(i + 1) * height // side))
            columns = slice(j * width // side, -(-(j + 1) * width // side))
            cells[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return cells


def context_loss(student, teacher):
    total = np.mean((student - teacher) ** 2)
    weight = weights = 1.0
    for side in (4, 2, 1):
        if side < min(student.shape[2:]):
            weight /= 2
            weights += weight
            total += weight * np.mean((pool(student, side) - pool(teacher, side)) ** 2)
    return total / weights


def resize(x, side):
    """The nearest pixel, as seen from the upper left."""
    index = np.arange(side) * x.shape[2] // side
    return x[:, :, index][:, :, :, index]


def convolve(x, kernel):
    """A 3x3 convolution that keeps the size."""
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return sum(
        np.einsum("oi,bihw->bohw", kernel[:, :, i, j], padded[:, :, i : i + height, j : j + width])
        for i in range(3)
        for j in range(3)
    )


def reviewed(state, stage, x, deeper, side):
    """What a fusion gives for the teacher, and for the next stage."""
    kernel = state[f"fusions.{stage}.reduce.0.weight"].numpy()
    z = np.einsum("oi,bihw->bohw", kernel[:, :, 0, 0], x) / UNSEEN
    if deeper is not None:
        deeper = resize(deeper, z.shape[2])
        kernel, bias = (
            state[f"fusions.{stage}.attention.0.{k}"].numpy() for k in ("weight", "bias")
        )
        both = np.concatenate([z, deeper], axis=1)
        scores = np.einsum("oi,bihw->bohw", kernel[:, :, 0, 0], both) + bias[:, None, None]
        gates = 1 / (1 + np.exp(-scores))
        z = gates[:, :1] * z + gates[:, 1:] * deeper
    z = resize(z, side)
    return convolve(z, state[f"fusions.{stage}.expand.0.weight"].numpy()) / UNSEEN, z


def build(draw, **keywords):
    """A loss of two stages and the pooled features, both models' outputs, batch norms at rest."""
    student = {"a": draw(0, 2, 4, 9, 9), "b": draw(1, 2, 5, 4, 4), "pooled": draw(2, 2, 7)}
    teacher = {"a": draw(3, 2, 3, 9, 9), "b": draw(4, 2, 6, 8, 8), "pooled": draw(5, 2, 5)}
    student, teacher = Outputs(features=student), Outputs(features=teacher)
    loss = losses.ReviewKD(stages=("a", "b"), **keywords)
    torch.manual_seed(0)
    loss.prepare(student, teacher)
    return loss.eval(), student, teacher


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 7, 5), (2, 3, 4, 4), (2, 3, 2, 2)])
def test_context_loss_is_the_weighted_mean_over_the_pyramid(draw, shape):
    student, teacher = draw(0, *shape), draw(1, *shape)
    expected = context_loss(student.numpy(), teacher.numpy())
    assert hcl_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_context_loss_of_one_position_is_the_mean_square(draw):
    student, teacher = draw(0, 4, 6, 1, 1), draw(1, 4, 6, 1, 1)
    torch.testing.assert_close(hcl_loss(student, teacher), (student - teacher).square().mean())


def test_gradient_of_the_context_loss_reaches_the_student_alone(draw):
    student, teacher = draw(0, 2, 2, 6, 6).requires_grad_(), draw(1, 2, 2, 6, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hcl_loss(x, teacher), student)
    hcl_loss(student, teacher).backward()
    assert teacher.grad is None


def test_stages_are_reviewed_from_deep_to_shallow(draw):
    loss, student, teacher = build(draw, weight=3.0)
    terms = loss(student, teacher, None)
    assert list(terms) == ["loss_reviewkd_a", "loss_reviewkd_b", "loss_reviewkd_pooled"]
    deeper = None
    for stage, side in (("pooled", 1), ("b", 8), ("a", 9)):
        x, target = (o.features[stage].numpy() for o in (student, teacher))
        if stage == "pooled":
            x, target = x[:, :, None, None], target[:, :, None, None]
        fused, deeper = reviewed(loss.state_dict(), stage, x, deeper, side)
        expected = 3 * context_loss(fused, target)
        assert terms[f"loss_reviewkd_{stage}"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("max_width", "width"), [(512, 7), (7, 7), (3, 3)])
def test_width_is_the_settings_or_that_of_the_pooled_features(draw, max_width, width):
    loss, _, _ = build(draw, max_width=max_width)
    for fusion in loss.fusions.values():
        assert fusion.reduce[0].out_channels == fusion.expand[0].in_channels == width
        assert fusion.attention is None or fusion.attention[0].in_channels == 2 * width
    assert [stage for stage, f in loss.fusions.items() if f.attention is None] == ["pooled"]


def test_a_shallow_term_teaches_the_deep_features_too(draw):
    loss, student, teacher = build(draw)
    for feature in student.features.values():
        feature.requires_grad_()
    loss(student, teacher, None)["loss_reviewkd_a"].backward()
    assert all(feature.grad.norm() > 0 for feature in student.features.values())


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("MobileNetV2", "vgg13"), ("ShuffleV2", "resnet32x4"), ("wrn_16_2", "ResNet50")],
)
def test_models_of_unlike_sizes(student, teacher):
    models = [create_model(name, 5) for name in (student, teacher)]
    taps = model_taps(*models, [])
    stages = [tap for tap in taps if re.fullmatch(r"stage[1-9]_preact", tap)]
    loss = losses.ReviewKD(stages=stages, max_width=16)
    distiller = Distiller(*models, [loss], taps)
    images = torch.randn(2, 3, 32, 32)
    distiller.prepare(images)
    terms = distiller(images, torch.tensor([0, 1]))
    sum(terms.values()).backward()
    assert len(terms) == len(stages) + 1 >= 4
    assert all(term.isfinite() and term > 0 for term in terms.values())
    assert all(p.grad is not None for p in loss.parameters())


def test_refusals(draw):
    loss, student, teacher = build(draw)
    unprepared = losses.ReviewKD(stages=("a", "b"))
    with pytest.raises(RuntimeError, match=r"Distiller\.prepare"):
        unprepared(student, teacher, None)
    with pytest.raises(ValueError, match="teacher: ReviewKD needs it"):
        unprepared.prepare(student, None)
    with pytest.raises(ValueError, match="stages must hold each name once"):
        losses.ReviewKD(stages=("pooled",))
    with pytest.raises(ValueError, match="max_width must be an integer of at least 1, got 0"):
        losses.ReviewKD(max_width=0)
    with pytest.raises(ValueError, match=r"a must be a feature map .* got \(2, 4, 5\)"):
        loss(Outputs(features={**student.features, "a": draw(0, 2, 4, 5)}), teacher, None)
    with pytest.raises(ValueError, match="one shape"):
        hcl_loss(draw(0, 2, 3, 4, 4), draw(1, 2, 4, 4, 4))
