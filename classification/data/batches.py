"""The batches of an epoch: their order and their augmentation depend on (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from classification.data.augment import crop_and_flip
from classification.data.image_set import ImageSet

ORDER_STREAM, AUGMENTATION_STREAM = 0, 1


def training_batches(data: ImageSet, cfg: CfgNode, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) for one epoch: float32 in [0, 1], (B, 3, S, S), and int64, (B,).

    Order and augmentation come from a random stream each, both made from (SEED, epoch): a resumed
    run goes on with the very images that it would have seen, and every method sees the same ones.
    All is drawn before the first batch, so that no step waits for the host. An incomplete last
    batch is left out, because alignment over the samples of a batch depends on their number.

    Args:
        data: the training images, on the device that trains.
        cfg: SEED, SOLVER.BATCH_SIZE, DATA.CROP_PADDING and DATA.FLIP are read.
        epoch: 0 for the first.
    """
    device, total, padding = data.images.device, len(data), cfg.DATA.CROP_PADDING
    order = torch.randperm(total, generator=_stream(cfg.SEED, epoch, ORDER_STREAM)).to(device)
    augmentation = _stream(cfg.SEED, epoch, AUGMENTATION_STREAM)
    offsets = torch.randint(2 * padding + 1, (total, 2), generator=augmentation).to(device)
    flipped = (torch.rand(total, generator=augmentation) < 0.5).to(device) & cfg.DATA.FLIP
    for batch in range(steps_per_epoch(data, cfg)):
        chosen = slice(batch * cfg.SOLVER.BATCH_SIZE, (batch + 1) * cfg.SOLVER.BATCH_SIZE)
        images = data.images[order[chosen]]
        if padding or cfg.DATA.FLIP:
            images = crop_and_flip(images, offsets[chosen], flipped[chosen], padding)
        yield to_unit_range(images), data.labels[order[chosen]]


def steps_per_epoch(data: ImageSet, cfg: CfgNode) -> int:
    """Return the number of complete batches in the set; a set smaller than one is refused."""
    steps = len(data) // cfg.SOLVER.BATCH_SIZE
    if steps == 0:
        raise ValueError(
            f"SOLVER.BATCH_SIZE: {cfg.SOLVER.BATCH_SIZE} is more than the {len(data)} training "
            "images; take a smaller batch or more images (DATA.TRAIN_IMAGES)"
        )
    return steps


def to_unit_range(images: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0, 1]."""
    return images.float().div_(255)


def _stream(seed: int, epoch: int, purpose: int) -> torch.Generator:
    """Return a generator of its own for each (seed, epoch, purpose)."""
    (state,) = np.random.SeedSequence((seed, epoch, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))
