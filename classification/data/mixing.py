"""Mixup and cutmix: the images of a batch are mixed with their neighbours, and so are targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.nn import functional as F

from classification.data.batches import MIXING_STREAM, Batch

SWITCH = 0.5  # share of batches that use cutmix if both are on


class Mixture(NamedTuple):
    """How the images of a batch are mixed with their neighbours.

    Attributes:
        share: weight of the image itself; the rest is the neighbour's.
        box: top, bottom, left and right edge of the neighbour's region (cutmix), pixels; None: the
            whole images are averaged (mixup).
    """

    share: float
    box: tuple[int, int, int, int] | None = None


def mixtures(cfg: CfgNode, epoch: int, steps: int) -> Iterator[Mixture]:
    """Yield the mixture of each batch of an epoch; it depends only on (SEED, epoch, step).

    The share is drawn from ``Beta(alpha, alpha)``, ``alpha`` being DATA.MIXUP (Zhang et al.,
    "mixup", ICLR 2018) or DATA.CUTMIX (Yun et al., "CutMix", ICCV 2019). If both are above 0,
    each batch uses one of the two at random. The box of cutmix has the neighbour's share of the
    area and its centre anywhere; it is clipped at the edges, and the share is recomputed.
    """
    mixup, cutmix, side = cfg.DATA.MIXUP, cfg.DATA.CUTMIX, cfg.DATA.IMAGE_SIZE
    # A generator with a frozen stream; torch's beta distribution takes no generator.
    seeds = np.random.SeedSequence((cfg.SEED, epoch, MIXING_STREAM))
    random = np.random.RandomState(np.random.MT19937(seeds))
    for _ in range(steps):
        cuts = random.random_sample() < (SWITCH if mixup else 1) and cutmix > 0
        share = random.beta(*2 * (cutmix if cuts else mixup,))
        row, column = random.randint(side, size=2).tolist()
        if not cuts:
            yield Mixture(share)
            continue
        length = int(side * (1 - share) ** 0.5)
        before, after = length // 2, (length + 1) // 2
        top, bottom = max(row - before, 0), min(row + after, side)
        left, right = max(column - before, 0), min(column + after, side)
        area = (bottom - top) * (right - left)
        yield Mixture(1 - area / side**2, (top, bottom, left, right))


def mix(batch: Batch, mixture: Mixture, classes: int) -> Batch:
    """Mix the images 0 and 1, 2 and 3, … of a batch with each other.

    Neighbours serve instead of a shuffled batch: the order is random already, and the parts of all
    processes are mixed as the whole batch would be.

    Args:
        batch: a batch with an even number of images.
        mixture: how to mix all of them.
        classes: number of classes, ``P``.

    Returns:
        The batch with mixed images and with targets ``(B, P)``, float32 class probabilities.
    """
    images, targets = batch.images, soft_targets(batch.labels, classes)
    of_neighbours = _swapped(images)
    if mixture.box is None:
        images = torch.lerp(of_neighbours, images, mixture.share)
    else:
        top, bottom, left, right = mixture.box
        images = images.clone()
        images[:, :, top:bottom, left:right] = of_neighbours[:, :, top:bottom, left:right]
    return Batch(images, torch.lerp(_swapped(targets), targets, mixture.share), batch.indices)


def soft_targets(labels: Tensor, classes: int) -> Tensor:
    """Return class indices ``(B,)`` as class probabilities ``(B, classes)``, float32."""
    return F.one_hot(labels, classes).float()


def mixing_keys(data: CfgNode) -> str:
    """Return the keys that enable mixing, for messages."""
    return " and ".join(f"DATA.{key}" for key in ("MIXUP", "CUTMIX") if data[key])


def _swapped(values: Tensor) -> Tensor:
    """Return ``(B, ...)`` with the items 0 and 1, 2 and 3, … swapped."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
