"""An image set held in memory as one uint8 tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.nn import functional as F

from classification.data.batches import (
    AUGMENTATION_STREAM,
    Batch,
    epoch_order,
    evaluation_share,
    random_stream,
    steps_per_epoch,
    to_unit_range,
    training_share,
)
from classification.data.image_set import EVALUATION_BATCH_SIZE, ImageSet


@dataclass(frozen=True)
class ResidentSet(ImageSet):
    """Images and labels on the training device, where whole batches are cropped and flipped.

    Attributes:
        images: (N, 3, S, S), uint8, RGB.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """A digest (hex) of images, labels and class names."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        digest.update(self.images.cpu().contiguous().numpy().data)
        digest.update(self.labels.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device) -> ResidentSet:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, indices: Tensor) -> ResidentSet:
        indices = indices.to(self.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def training_batches(
        self, cfg: CfgNode, epoch: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Yield :meth:`ImageSet.training_batches`, as DATA.CROP_PADDING and DATA.FLIP specify.

        All random numbers are drawn before the first batch, so that no step waits for the host.
        """
        padding, flips = cfg.DATA.CROP_PADDING, cfg.DATA.FLIP
        augmentation = random_stream(cfg.SEED, epoch, AUGMENTATION_STREAM)
        offsets = torch.randint(2 * padding + 1, (len(self), 2), generator=augmentation)
        flipped = (torch.rand(len(self), generator=augmentation) < 0.5) & flips
        share = (steps_per_epoch(self, cfg, world_size), cfg.SOLVER.BATCH_SIZE, rank, world_size)
        drawn = (epoch_order(self, cfg, epoch), offsets, flipped)
        for chosen, corners, mirrored in zip(
            *(training_share(values, *share).to(self.device) for values in drawn)
        ):
            images = self.images[chosen]
            if padding or flips:
                images = crop_and_flip(images, corners, mirrored, padding)
            yield Batch(to_unit_range(images), self.labels[chosen], chosen)

    def evaluation_batches(
        self, batch_size: int = EVALUATION_BATCH_SIZE, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        for share in evaluation_share(self, batch_size, rank, world_size):
            chosen = share.to(self.device)
            yield Batch(to_unit_range(self.images[chosen]), self.labels[chosen], chosen)


def crop_and_flip(images: Tensor, offsets: Tensor, flipped: Tensor, padding: int) -> Tensor:
    """Pad every image with zeros, crop a window of the original size, mirror it if requested.

    ``out[b, c, y, x] = padded[b, c, offsets[b, 0] + y, offsets[b, 1] + x']`` with ``x' = x``, or
    ``S - 1 - x`` where ``flipped[b]``.

    Args:
        images: (B, C, S, S), any dtype.
        offsets: upper left corner (row, column) of each window in the padded image, (B, 2) int64,
            within 0..2 * padding.
        flipped: which windows are mirrored left to right, (B,) bool.
        padding: pixels added on each side.

    Returns:
        (B, C, S, S), the images' dtype.
    """
    batch, channels, _, side = images.shape
    padded = F.pad(images, [padding] * 4)
    line = torch.arange(side, device=images.device)
    rows = offsets[:, :1] + line
    columns = offsets[:, 1:] + torch.where(flipped[:, None], line.flip(0), line)
    image = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
