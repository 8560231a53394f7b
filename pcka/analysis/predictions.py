"""A classifier's predictions on labelled images: errors, confidence, agreement with another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BEST = 5  # largest logits, among which the label is looked for
BINS = 15  # of confidence, as in most papers


class Bin(NamedTuple):
    """The images in one interval of confidence.

    Attributes:
        low: lower bound of the confidence, exclusive.
        high: upper bound of the confidence, inclusive.
        images: number of images.
        confidence: mean confidence; 0 if there are no images.
        accuracy: share of correct images; 0 if there are none.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Predictions:
    """A summary of a classifier's logits: a few numbers per image.

    Attributes:
        labels: ``(N,)`` int64.
        best: classes of the largest logits, ``(N, K)`` int64, ``K`` at most :data:`BEST`.
        confidence: largest probability, ``(N,)`` float32.
        classes: number of classes.
    """

    labels: Tensor
    best: Tensor
    confidence: Tensor
    classes: int

    @classmethod
    def of_logits(cls, logits: Tensor, labels: Tensor) -> Predictions:
        """Summarise logits ``(N, C)`` and labels ``(N,)``.

        Raises:
            ValueError: not one label per row of logits.
        """
        if logits.dim() != 2 or labels.shape != logits.shape[:1]:
            shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"logits and labels must be (N, C) and (N,), got {shapes}")
        best = logits.topk(min(BEST, logits.shape[1]), dim=1).indices
        confidence = logits.float().softmax(dim=1).amax(dim=1)
        return cls(labels, best, confidence, logits.shape[1])

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Concatenate the predictions of several batches."""
        return cls(
            labels=torch.cat([part.labels for part in parts]),
            best=torch.cat([part.best for part in parts]),
            confidence=torch.cat([part.confidence for part in parts]),
            classes=parts[0].classes,
        )

    def cpu(self) -> Predictions:
        """Copy to host memory."""
        return Predictions(self.labels.cpu(), self.best.cpu(), self.confidence.cpu(), self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def right(self) -> Tensor:
        """Whether the largest logit is the label's, ``(N,)`` bool."""
        return self.best[:, 0] == self.labels

    def hits(self) -> Tensor:
        """Number of labels at the largest logit, the second largest, ...: ``(K,)`` int64."""
        return (self.best == self.labels[:, None]).sum(0)

    def confusion(self) -> Tensor:
        """Counts by label (rows) and prediction (columns), ``(C, C)`` int64."""
        pairs = self.labels * self.classes + self.best[:, 0]
        return torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    def class_accuracy(self) -> list[float | None]:
        """Percentage correct per class; None for a class without images."""
        confusion = self.confusion()
        pairs = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist())
        return [100 * right / images if images else None for right, images in pairs]

    def reliability(self, bins: int = BINS) -> list[Bin]:
        """Accuracy by confidence, in intervals ``(low, high]`` of equal width (Guo et al. 2017)."""
        confidence, right = self.confidence.double(), self.right.double()
        index = (confidence * bins).ceil().long().clamp(1, bins) - 1
        images = torch.bincount(index, minlength=bins)
        sums = (torch.bincount(index, values, minlength=bins) for values in (confidence, right))
        means = (torch.where(images > 0, total / images.clamp(min=1), 0.0) for total in sums)
        edges = [step / bins for step in range(bins + 1)]
        columns = images.tolist(), *(mean.tolist() for mean in means)
        return [Bin(*row) for row in zip(edges, edges[1:], *columns)]

    def calibration_error(self, bins: int = BINS) -> float:
        """Expected calibration error, ``sum_b n_b / N |accuracy_b - confidence_b|``, in [0, 1].

        Source: Guo et al. 2017, eq. 5, with the intervals of :meth:`reliability`. NaN without
        images.
        """
        gaps = (b.images * abs(b.accuracy - b.confidence) for b in self.reliability(bins))
        return sum(gaps) / len(self) if len(self) else math.nan

    def agreement(self, other: Predictions) -> float:
        """Percentage of images, the same ones in both, for which both predict the same class.

        Raises:
            ValueError: they are of different numbers of images.
        """
        if len(self) != len(other):
            raise ValueError(f"other: expected {len(self)} images, got {len(other)}")
        return 100 * float((self.best[:, 0] == other.best[:, 0]).double().mean())
