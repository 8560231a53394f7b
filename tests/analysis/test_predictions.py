"""Every figure against a plain computation in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pcka.analysis.predictions import Predictions

CLASSES, IMAGES = 7, 300


@pytest.fixture
def logits():
    return 3 * torch.randn(IMAGES, CLASSES, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    # No image of the last class.
    return torch.randint(CLASSES - 1, (IMAGES,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def said(logits, labels):
    return Predictions.of_logits(logits, labels)


def probabilities(logits):
    exponents = np.exp(logits.double().numpy())
    return exponents / exponents.sum(1, keepdims=True)


def test_hits_are_the_places_of_the_labels(said, logits, labels):
    order = np.argsort(-logits.numpy(), axis=1)
    place = (order == labels.numpy()[:, None]).argmax(1)
    assert said.hits().tolist() == [int((place == k).sum()) for k in range(5)]
    assert said.right.numpy().tolist() == (place == 0).tolist()


def test_confusion_has_a_row_for_each_label(said, logits, labels):
    expected = np.zeros((CLASSES, CLASSES), dtype=int)
    for label, predicted in zip(labels.tolist(), logits.numpy().argmax(1)):
        expected[label, predicted] += 1
    assert said.confusion().numpy().tolist() == expected.tolist()
    by_class = said.class_accuracy()
    for index in range(CLASSES - 1):
        assert by_class[index] == pytest.approx(
            100 * expected[index, index] / expected[index].sum()
        )
    assert by_class[-1] is None


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_calibration_error_is_guos(said, logits, labels, bins):
    chances = probabilities(logits)
    confidence, right = chances.max(1), chances.argmax(1) == labels.numpy()
    expected = 0.0
    for low in np.arange(bins) / bins:
        inside = (confidence > low) & (confidence <= low + 1 / bins)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert said.calibration_error(bins) == pytest.approx(expected, abs=1e-6)
    assert sum(b.images for b in said.reliability(bins)) == IMAGES


def test_intervals_hold_their_upper_end_and_empty_ones_are_zero():
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 1e-20]]))
    said = Predictions.of_logits(logits, torch.tensor([0, 1, 0]))
    low, high = said.reliability(2)
    assert (low.images, low.confidence, low.accuracy) == (2, 0.5, 0.5)
    assert (high.low, high.high, high.images, high.accuracy) == (0.5, 1.0, 1, 1.0)
    assert said.reliability(4)[2] == (0.5, 0.75, 0, 0.0, 0.0)


def test_agreement_counts_equal_predictions_right_or_wrong(said, logits, labels):
    other = logits.clone()
    other[:30] = -other[:30]
    expected = 100 * (logits.argmax(1) == other.argmax(1)).double().mean().item()
    assert said.agreement(Predictions.of_logits(other, labels)) == pytest.approx(expected)
    assert expected < 95
    assert said.agreement(said) == 100


def test_batches_join_to_the_whole(said, logits, labels):
    parts = [
        Predictions.of_logits(*(x[start : start + 128] for x in (logits, labels)))
        for start in range(0, IMAGES, 128)
    ]
    joined = Predictions.joined(parts)
    assert len(joined) == IMAGES and torch.equal(joined.best, said.best)
    assert joined.calibration_error() == said.calibration_error()


def test_two_classes_have_two_places(labels):
    said = Predictions.of_logits(torch.randn(IMAGES, 2), labels % 2)
    assert said.hits().sum() == IMAGES and said.confusion().shape == (2, 2)


def test_of_no_images_nothing_is_known(said):
    nothing = Predictions.of_logits(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert math.isnan(nothing.calibration_error())
    with pytest.raises(ValueError, match=f"other: expected {IMAGES} images, got 0"):
        said.agreement(nothing)
    with pytest.raises(ValueError, match=r"\(N, C\) and \(N,\), got \(4, 3\) and \(1,\)"):
        Predictions.of_logits(torch.zeros(4, 3), torch.zeros(1, dtype=torch.int64))
