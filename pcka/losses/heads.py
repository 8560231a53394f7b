"""Outputs of detectors' and segmenters' heads, for the losses that compare predictions.

A detector's trainer fills these in; the losses depend on no detector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Inner = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class Dense:
    """Predictions at every position and anchor, concatenated over all levels.

    Args:
        logits: ``(B, R, K)``, a score for each class, before the sigmoid.
        boxes: ``(B, R, 4)``, x0, y0, x1, y1 in pixels, float32 or better.
        distributions: ``(B, R, 4, N)``, logits over the distances of each edge, from heads that
            predict them; None for heads that predict one number per edge.
    """

    logits: Tensor
    boxes: Tensor
    distributions: Tensor | None = None


@dataclass(frozen=True)
class DenseHead:
    """The outputs of a dense head on one batch.

    Args:
        predictions: the head's own predictions; None if no loss needs them.
        inner: branch -> one map ``(B, C, H, W)`` per level, from inside the head.
        rest: maps like ``inner`` -> the predictions of the head's remaining layers, with their
            autograd graph; None if no loss needs them.
    """

    predictions: Dense | None = None
    inner: Inner = field(default_factory=dict)
    rest: Callable[[Inner], Dense] | None = None


@dataclass(frozen=True)
class RegionHead:
    """The outputs of a region head for proposals that both models share.

    Args:
        logits: ``(R, K + 1)``, the background last, before the softmax.
        deltas: ``(R, K, 4)``, or ``(R, 1, 4)`` if class-agnostic: the shifts of centre and size, as
            both models encode them.
        proposals: boxes of each image, as the detector represents them.
    """

    logits: Tensor
    deltas: Tensor
    proposals: Sequence[Any] = ()


@dataclass(frozen=True)
class PixelHead:
    """The outputs of a per-pixel classification head on one batch.

    Args:
        logits: ``(B, K, H, W)``, a score for each class, before the softmax.
        features: ``(B, C, H, W)``, the input of its last layer.
        labels: ``(B, H', W')`` int64, the class of each pixel, or -1 if ignored; None if no labels
            were given.
    """

    logits: Tensor
    features: Tensor
    labels: Tensor | None = None
