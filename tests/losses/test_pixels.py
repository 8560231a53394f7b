"""Losses of the classes of pixels against their equations in NumPy, position by position."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from pcka import losses
from pcka.losses import (
    Outputs,
    cwd_loss,
    ifvd_loss,
    lcka_loss,
    pixel_cka_loss,
    pixel_kd_loss,
)
from pcka.losses.heads import PixelHead, RegionHead

B, K, H, W = 2, 3, 2, 4
LABELS = torch.tensor(  # at twice the height; the second image lacks a class and has unlabelled
    [
        [[0, 0, 1, 1], [9, 9, 9, 9], [2, 0, 1, 1], [9, 9, 9, 9]],
        [[0, 0, 0, 0], [9, 9, 9, 9], [-1, 2, 2, -1], [9, 9, 9, 9]],
    ]
)
NAMES = ("IFVD", "PIXELCKA", "PIXELCWD", "PIXELKD")


def _kd(student, teacher, temperature):
    total = 0
    for b, i, j in np.ndindex(B, H, W):
        s, t = student[b, :, i, j] / temperature, teacher[b, :, i, j] / temperature
        p, q = np.exp(t) / np.exp(t).sum(), np.exp(s) / np.exp(s).sum()
        total += (p * (np.log(p) - np.log(q))).sum()
    return temperature**2 * total / (B * H * W)


def test_kd_of_pixels_is_its_equation(draw, meets_numpy):
    meets_numpy(
        lambda s, t: pixel_kd_loss(s, t, temperature=1.7),
        lambda s, t: _kd(s, t, 1.7),
        draw(0, B, K, H, W),
        draw(1, B, K, H, W),
    )


def _cka(x, y):
    n = len(x)
    middle = np.eye(n) - np.ones((n, n)) / n
    k, other = middle @ x @ x.T @ middle, middle @ y @ y.T @ middle
    return (k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum())


def _rows(x, samples):
    return x.reshape(B, -1) if samples == "images" else np.moveaxis(x, 1, -1).reshape(-1, K)


@pytest.mark.parametrize("samples", ["positions", "images"])
def test_cka_of_pixels_is_its_equation(draw, meets_numpy, samples):
    def rewriting(s, t):
        x, y = _rows(s, samples), _rows(t, samples)
        # Two images are constant when centered, and left out.
        intra = 0 if samples == "images" else 1 - _cka(x, y)
        return 2.0 * intra + 0.5 * (1 - _cka(x.T, y.T))

    warned = pytest.warns(losses.DegenerateLevelWarning) if samples == "images" else nullcontext()
    with warned:
        meets_numpy(
            lambda s, t: pixel_cka_loss(s, t, intra_weight=2.0, inter_weight=0.5, samples=samples),
            rewriting,
            draw(0, B, K, H, W),
            draw(1, B, K, H, W),
        )


def test_cka_of_one_pixel_an_image_is_that_of_images(draw):
    student, teacher = draw(0, 5, K, 1, 1), draw(1, 5, K, 1, 1)
    expected = lcka_loss(student[..., 0, 0], teacher[..., 0, 0], intra_weight=10, inter_weight=10)
    for samples in ("positions", "images"):
        torch.testing.assert_close(pixel_cka_loss(student, teacher, samples=samples), expected)


def _length(x):
    return np.sqrt((x * x).sum())


def _ifvd(student, teacher):
    labels, total = LABELS[:, ::2].numpy(), 0
    for b, i, j in np.ndindex(B, H, W):
        if labels[b, i, j] < 0:
            continue
        likeness = []
        for maps in (student[b], teacher[b]):
            mean = maps[:, labels[b] == labels[b, i, j]].mean(1)
            own = maps[:, i, j]
            likeness.append((own * mean).sum() / (_length(own) * _length(mean)))
        total += (likeness[0] - likeness[1]) ** 2
    return total / (B * H * W)


def test_ifvd_is_its_equation(draw, meets_numpy):
    meets_numpy(
        lambda s, t: ifvd_loss(s, t, LABELS, 10), _ifvd, draw(0, B, 5, H, W), draw(1, B, 4, H, W)
    )


def test_features_of_zeros_leave_ifvd_with_a_gradient_of_its_size(draw):
    student = draw(0, B, 5, H, W)
    student[:, :, 0, 0] = 0
    student.requires_grad_()
    ifvd_loss(student, draw(1, B, 4, H, W), LABELS, 10).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 10


def _outputs(draw, seed, classes=10, size=(H, W), width=5):
    logits, features = draw(seed, B, classes, *size), draw(seed + 1, B, width, *size)
    return Outputs(head=PixelHead(logits, features, LABELS))


def test_each_has_its_terms_and_weights(draw):
    student, teacher = _outputs(draw, 0), _outputs(draw, 2, width=4)
    own, other = student.head, teacher.head
    expected = {
        "PIXELKD": {"loss_pixelkd": 2 * pixel_kd_loss(own.logits, other.logits)},
        "PIXELCWD": {"loss_pixelcwd": 2 * cwd_loss(own.logits, other.logits, temperature=4.0)},
        "IFVD": {"loss_ifvd": 2 * ifvd_loss(own.features, other.features, LABELS, 10)},
    }
    for name, terms in expected.items():
        found = losses.build(name, weight=2.0)(student, teacher, None)
        torch.testing.assert_close(found, terms)
    terms = losses.build("PIXELCKA", intra_weight=2.0, inter_weight=0.5)(student, teacher, None)
    assert terms.keys() == {"loss_pixelcka_intra", "loss_pixelcka_inter"}
    whole = pixel_cka_loss(own.logits, other.logits, intra_weight=2.0, inter_weight=0.5)
    torch.testing.assert_close(sum(terms.values()), whole)


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_another_size_are_pooled(draw, name):
    student = _outputs(draw, 0, size=(2 * H, 2 * W))
    teacher = _outputs(draw, 2)
    loss = losses.build(name)
    loss.prepare(student, teacher)
    assert all(term.isfinite() for term in loss(student, teacher, None).values())


@pytest.mark.parametrize("name", NAMES[1:])
def test_other_classes_are_refused_before_the_training(draw, name):
    student, teacher = _outputs(draw, 0), _outputs(draw, 2, classes=9)
    with pytest.raises(ValueError, match="the same number of classes, in the same order"):
        losses.build(name).prepare(student, teacher)


@pytest.mark.parametrize("name", NAMES)
def test_another_head_is_refused(draw, name):
    regions = Outputs(head=RegionHead(draw(0, 2, K), draw(1, 2, K, 4)))
    for student, teacher, role in (
        (regions, _outputs(draw, 0), "student"),
        (_outputs(draw, 0), regions, "teacher"),
    ):
        with pytest.raises(ValueError, match=rf"{role}\.head: \w+ needs the class scores"):
            losses.build(name).prepare(student, teacher)


def test_ifvd_without_labels_or_with_others_is_refused(draw):
    student = Outputs(head=PixelHead(draw(0, B, K, H, W), draw(1, B, 5, H, W)))
    with pytest.raises(ValueError, match=r"student\.head\.labels: IFVD needs it"):
        losses.build("IFVD")(student, _outputs(draw, 2), None)
    features = draw(0, B, 5, H, W)
    with pytest.raises(ValueError, match="labels must hold the class of each pixel"):
        ifvd_loss(features, features, LABELS[:1], 10)
    with pytest.raises(ValueError, match="of the same H and W"):
        ifvd_loss(features, features[..., :1], LABELS, 10)


def test_unknown_samples_are_refused(draw):
    with pytest.raises(ValueError, match="samples must be one of positions, images; got 'rows'"):
        losses.build("PIXELCKA", samples="rows")
    with pytest.raises(ValueError, match="samples must be one of"):
        pixel_cka_loss(draw(0, B, K, H, W), draw(1, B, K, H, W), samples="rows")
