"""What an image set is to the training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from classification.data.batches import Batch

EVALUATION_BATCH_SIZE = 256  # images at once; what is measured does not depend on it


class ImageSet(ABC):
    """Labelled images that give batches on one device, the same ones wherever their pixels lie.

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
        """A digest (hex) of what a training on the set depends on."""

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

        Order and augmentation depend on (SEED, epoch, image) alone: a resumed run goes on with
        the very images that it would have seen, every method sees the same ones, and the parts of
        all processes, one after the other, are the batch of a single process. The global random
        generators have no part in it. An incomplete last batch is left out, because alignment
        over the samples of a batch depends on their number.

        Args:
            cfg: SEED, SOLVER.BATCH_SIZE (of all processes together) and the augmentation's keys
                in DATA are read.
            epoch: 0 for the first.
            rank: of this process.
            world_size: number of processes.

        Raises:
            ConfigError: a batch that the set or the processes cannot make up.
        """

    @abstractmethod
    def evaluation_batches(
        self, batch_size: int = EVALUATION_BATCH_SIZE, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Yield the images ``rank``, ``rank + world_size``, … in order, each once, as they are.

        Args:
            batch_size: images at once in this process.
            rank: of this process.
            world_size: number of processes; their parts may differ in length by one image.
        """


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
