"""What the heads of detectors give, for the losses that compare predictions.

A detector's trainer fills these in; the losses know no detector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Inner = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class Dense:
    """Predictions at every position and anchor of all levels, one after the other.

    Args:
        logits: ``(B, R, K)``, a score for each class, before the sigmoid.
        boxes: ``(B, R, 4)``, x0, y0, x1, y1 in pixels, float32 or better.
        distributions: ``(B, R, 4, N)``, logits over the distances of each edge, of heads that
            predict them; None for those that predict one number an edge.
    """

    logits: Tensor
    boxes: Tensor
    distributions: Tensor | None = None


@dataclass(frozen=True)
class DenseHead:
    """What a dense head gave on one batch.

    Args:
        predictions: the head's own; None where no loss needs them.
        inner: branch -> a map ``(B, C, H, W)`` of each level, within the head.
        rest: maps like ``inner`` -> what the head's remaining layers predict from them, with a
            graph; None where no loss needs it.
    """

    predictions: Dense | None = None
    inner: Inner = field(default_factory=dict)
    rest: Callable[[Inner], Dense] | None = None


@dataclass(frozen=True)
class RegionHead:
    """What a head of regions gave for the same proposals in both models.

    Args:
        logits: ``(R, K + 1)``, the background last, before the softmax.
        deltas: ``(R, K, 4)``, or ``(R, 1, 4)`` for one box whatever the class: the shifts of
            centre and size, as both models encode them.
        proposals: boxes of each image, as the detector holds them.
    """

    logits: Tensor
    deltas: Tensor
    proposals: Sequence[Any] = ()


@dataclass(frozen=True)
class PixelHead:
    """What a head of classes of pixels gave on one batch.

    Args:
        logits: ``(B, K, H, W)``, a score for each class, before the softmax.
        features: ``(B, C, H, W)``, what its last layer was given.
        labels: ``(B, H', W')`` int64, the class of each pixel, or -1 where none counts; None where
            it was told none.
    """

    logits: Tensor
    features: Tensor
    labels: Tensor | None = None
