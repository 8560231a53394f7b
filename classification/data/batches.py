"""Assignment of images to batches and processes; it depends only on (SEED, epoch)."""

from __future__ import annotations

from collections.abc import Sized
from typing import NamedTuple

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from pcka.engine.config import ConfigError

# Purposes of random numbers, each with separate streams.
ORDER_STREAM, AUGMENTATION_STREAM, IMAGE_STREAM, PROCESS_STREAM = 0, 1, 2, 3
RAND_AUGMENT_STREAM, ERASING_STREAM, MIXING_STREAM = 4, 5, 6


class Batch(NamedTuple):
    """A batch on the training device.

    Attributes:
        images: (B, 3, S, S), float32 in [0, 1], RGB.
        labels: (B,), int64; for mixed images (B, P), float32 class probabilities.
        indices: the images' positions in their set, (B,), int64.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


def steps_per_epoch(data: Sized, cfg: CfgNode, world_size: int = 1) -> int:
    """Return the number of complete batches of ``SOLVER.BATCH_SIZE`` images in a set.

    ``SOLVER.ACCUMULATE`` batches together make an update; an incomplete group is dropped.

    Args:
        data: the training images.
        cfg: SOLVER.BATCH_SIZE (images of one step in all processes together), SOLVER.ACCUMULATE,
            DATA.MIXUP and DATA.CUTMIX are read.
        world_size: number of processes that share every batch.

    Raises:
        ConfigError: the set is smaller than one group, or the processes cannot share a batch evenly
            (in pairs if images are mixed).
    """
    batch_size, group = cfg.SOLVER.BATCH_SIZE, cfg.SOLVER.ACCUMULATE
    if surplus := batch_size % world_size:
        raise ConfigError(
            f"SOLVER.BATCH_SIZE: expected a multiple of {world_size}, the number of processes, "
            f"got {batch_size}; use {batch_size - surplus + world_size}"
        )
    if mixes(cfg.DATA) and (surplus := batch_size % (2 * world_size)):
        raise ConfigError(
            f"SOLVER.BATCH_SIZE: expected a multiple of {2 * world_size}, because DATA.MIXUP and "
            "DATA.CUTMIX mix pairs of images within each process, "
            f"got {batch_size}; use {batch_size - surplus + 2 * world_size}"
        )
    updates = len(data) // (batch_size * group)
    if updates == 0:
        keys = "SOLVER.BATCH_SIZE" + " times SOLVER.ACCUMULATE" * (group > 1)
        raise ConfigError(
            f"{keys}: {batch_size * group} is more than the {len(data)} training "
            "images; use a smaller batch or more images (DATA.TRAIN_IMAGES)"
        )
    return updates * group


def mixes(data: CfgNode) -> bool:
    """Whether the section DATA asks for mixed images, whose targets are soft."""
    return data.MIXUP > 0 or data.CUTMIX > 0


def epoch_order(data: Sized, cfg: CfgNode, epoch: int) -> Tensor:
    """Return the images' positions in the order of an epoch, (N,) int64."""
    return torch.randperm(len(data), generator=random_stream(cfg.SEED, epoch, ORDER_STREAM))


def training_share(values: Tensor, steps: int, batch_size: int, rank: int, world: int) -> Tensor:
    """Return one process's share of every batch: its contiguous ``rank``-th part.

    The parts of all processes, concatenated, are the batch of a single process.

    Args:
        values: one for each image, in the epoch's order, (N, ...); N >= steps * batch_size.
        steps: number of batches; the remaining images are dropped.
        batch_size: images of a batch in all processes together.
        rank: rank of this process.
        world: number of processes.

    Returns:
        (steps, batch_size / world, ...).
    """
    return values[: steps * batch_size].unflatten(0, (steps, world, -1))[:, rank]


def evaluation_share(data: Sized, batch_size: int, rank: int, world: int) -> list[Tensor]:
    """Return the positions ``rank``, ``rank + world``, … in batches; the last may be smaller."""
    positions = torch.arange(len(data))[rank::world]
    return [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]


def to_unit_range(images: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0, 1]."""
    return images.float().div_(255)


def random_stream(*purpose: int) -> torch.Generator:
    """Return a separate generator for each (seed, epoch, purpose)."""
    return torch.Generator().manual_seed(stream_seed(*purpose))


def stream_seed(*purpose: int) -> int:
    """Return the seed of the stream for (seed, epoch, purpose) or (seed, epoch, purpose, index)."""
    (state,) = np.random.SeedSequence(purpose).generate_state(1, np.uint64)
    return int(state)
