"""Which images make up which batch, in which process: by (SEED, epoch) alone."""

from __future__ import annotations

from collections.abc import Sized
from typing import NamedTuple

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from pcka.engine.config import ConfigError

# Purposes that random numbers are drawn for, each with streams of its own.
ORDER_STREAM, AUGMENTATION_STREAM, IMAGE_STREAM, PROCESS_STREAM = 0, 1, 2, 3
RAND_AUGMENT_STREAM, ERASING_STREAM, MIXING_STREAM = 4, 5, 6


class Batch(NamedTuple):
    """A batch on the device that trains.

    Attributes:
        images: (B, 3, S, S), float32 in [0, 1], RGB.
        labels: (B,), int64; of mixed images (B, P), float32 class probabilities.
        indices: the images' positions in their set, (B,), int64.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


def steps_per_epoch(data: Sized, cfg: CfgNode, world_size: int = 1) -> int:
    """Return the number of complete batches of ``SOLVER.BATCH_SIZE`` images in a set.

    Of those that make an update together, ``SOLVER.ACCUMULATE``, an incomplete group is left out.

    Args:
        data: the training images.
        cfg: SOLVER.BATCH_SIZE is read: images of one step in all processes together; and
            SOLVER.ACCUMULATE.
        world_size: number of processes that share every batch.

    Raises:
        ConfigError: the set is smaller than one group, or the processes cannot share it evenly, in
            pairs where images are mixed.
    """
    batch_size, group = cfg.SOLVER.BATCH_SIZE, cfg.SOLVER.ACCUMULATE
    if surplus := batch_size % world_size:
        raise ConfigError(
            f"SOLVER.BATCH_SIZE: expected a multiple of {world_size}, the number of processes, "
            f"got {batch_size}; take {batch_size - surplus + world_size}"
        )
    if mixes(cfg.DATA) and (surplus := batch_size % (2 * world_size)):
        raise ConfigError(
            f"SOLVER.BATCH_SIZE: expected a multiple of {2 * world_size}, because DATA.MIXUP and "
            "DATA.CUTMIX mix pairs of images within each process, "
            f"got {batch_size}; take {batch_size - surplus + 2 * world_size}"
        )
    updates = len(data) // (batch_size * group)
    if updates == 0:
        keys = "SOLVER.BATCH_SIZE" + " times SOLVER.ACCUMULATE" * (group > 1)
        raise ConfigError(
            f"{keys}: {batch_size * group} is more than the {len(data)} training "
            "images; take a smaller batch or more images (DATA.TRAIN_IMAGES)"
        )
    return updates * group


def mixes(data: CfgNode) -> bool:
    """Whether the section DATA asks for mixed images, whose targets are soft."""
    return data.MIXUP > 0 or data.CUTMIX > 0


def epoch_order(data: Sized, cfg: CfgNode, epoch: int) -> Tensor:
    """Return the images' positions in the order of an epoch, (N,) int64."""
    return torch.randperm(len(data), generator=random_stream(cfg.SEED, epoch, ORDER_STREAM))


def training_share(values: Tensor, steps: int, batch_size: int, rank: int, world: int) -> Tensor:
    """Return what one process takes of every batch: its contiguous ``rank``-th part.

    The parts of all processes, one after the other, are the batch of a single process.

    Args:
        values: of each image in the order of the epoch, (N, ...); N >= steps * batch_size.
        steps: number of batches; what is left over after them is left out.
        batch_size: images of a batch, of all processes together.
        rank: of this process.
        world: number of processes.

    Returns:
        (steps, batch_size / world, ...).
    """
    return values[: steps * batch_size].unflatten(0, (steps, world, -1))[:, rank]


def evaluation_share(data: Sized, batch_size: int, rank: int, world: int) -> list[Tensor]:
    """Return the positions ``rank``, ``rank + world``, … in batches, the last maybe smaller."""
    positions = torch.arange(len(data))[rank::world]
    return [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]


def to_unit_range(images: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0, 1]."""
    return images.float().div_(255)


def random_stream(*purpose: int) -> torch.Generator:
    """Return a generator of its own for each (seed, epoch, purpose)."""
    return torch.Generator().manual_seed(stream_seed(*purpose))


def stream_seed(*purpose: int) -> int:
    """Return the seed of the stream for (seed, epoch, purpose) or (seed, epoch, purpose, index)."""
    (state,) = np.random.SeedSequence(purpose).generate_state(1, np.uint64)
    return int(state)
