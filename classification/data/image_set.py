"""What an image set is, before it is read (its labels) and after (one tensor)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A set whose labels are known and whose images can be read.

    Attributes:
        labels: class index of each image, (N,) int64.
        classes: class names, by index.
        read: image indices (M,) -> their pixels (M, 3, S, S), uint8, RGB.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[np.ndarray], Tensor]


@dataclass(frozen=True)
class ImageSet:
    """Images and labels in memory.

    Attributes:
        images: (N, 3, S, S), uint8, RGB.
        labels: (N,), int64.
        classes: class names, by index.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> ImageSet:
        """Return the set on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    @cached_property
    def fingerprint(self) -> str:
        """A digest (hex) of images, labels and class names."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        digest.update(self.images.cpu().contiguous().numpy())
        digest.update(self.labels.cpu().contiguous().numpy())
        return digest.hexdigest()


def balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return a shuffled order of the images in which every prefix is as class-balanced as can be.

    Each class is shuffled; the first images of all classes come first, then the second ones, and
    so on. numpy's legacy generator is used because its stream is frozen: a split is one for ever.

    Args:
        labels: (N,) int64.
        seed: of the shuffling.
    """
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    by_class = np.argsort(labels[shuffled], kind="stable")
    counts = np.bincount(labels)
    first_of_class = np.concatenate(([0], np.cumsum(counts)[:-1]))
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(first_of_class, counts)
    return shuffled[np.lexsort((labels[shuffled], rank))]
