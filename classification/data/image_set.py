"""The interface of image sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from classification.data.batches import Batch

EVALUATION_BATCH_SIZE = 256  # does not affect the results


class ImageSet(ABC):
    """Labelled images that yield batches on one device, the same wherever the pixels are stored.

    Attributes:
        labels: (N,), int64, on the device of the batches.
        classes: class names, by index.
    """

    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """The device of the batches."""
        return self.labels.device

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest (hex) of everything that training on the set depends on."""

    @abstractmethod
    def to(self, device: torch.device) -> ImageSet:
        """Return the set with its batches on another device."""

    @abstractmethod
    def subset(self, indices: Tensor) -> ImageSet:
        """Return the set of the images at ``indices``, (M,) int64, in that order."""

    @abstractmethod
    def training_batches(
        self, cfg: CfgNode, epoch: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Yield this process's part of every batch of one epoch, shuffled and augmented.

        Order and augmentation depend only on (SEED, epoch, image): a resumed run continues with
        exactly the images that it would have seen, every method sees the same ones, and the parts
        of all processes, concatenated, are the batch of a single process. The global random
        generators have no influence. An incomplete last batch is dropped, because alignment over
        the samples of a batch depends on their number.

        Args:
            cfg: SEED, SOLVER.BATCH_SIZE (of all processes together) and the augmentation's keys
                in DATA are read.
            epoch: 0 for the first.
            rank: rank of this process.
            world_size: number of processes.

        Raises:
            ConfigError: the set is too small for a batch, or the processes cannot share it evenly.
        """

    @abstractmethod
    def evaluation_batches(
        self, batch_size: int = EVALUATION_BATCH_SIZE, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Yield the images ``rank``, ``rank + world_size``, … in order, each once, unaugmented.

        Args:
            batch_size: images per batch in this process.
            rank: rank of this process.
            world_size: number of processes; their parts may differ in length by one image.
        """


def balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return a shuffled order of images whose every prefix is as class-balanced as possible.

    Each class is shuffled; the first images of all classes come first, then the second ones, and
    so on. numpy's legacy generator is used because its stream is frozen, so a split never changes.

    Args:
        labels: (N,) int64.
        seed: seed of the shuffling.
    """
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    by_class = np.argsort(labels[shuffled], kind="stable")
    counts = np.bincount(labels)
    first_of_class = np.concatenate(([0], np.cumsum(counts)[:-1]))
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(first_of_class, counts)
    return shuffled[np.lexsort((labels[shuffled], rank))]
