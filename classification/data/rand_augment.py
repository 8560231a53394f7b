"""RandAugment of whole batches: images that get the same operation are transformed at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

STRONGEST = 30  # the magnitudes are 0..30
LARGEST_SHEAR = 0.3
LARGEST_SHIFT = 150 / 331  # share of the side
LARGEST_ANGLE = 30.0  # degrees
LARGEST_CHANGE = 0.9  # of the factors of colours

Operation = Callable[[Tensor], Tensor]


def operations(magnitude: int, side: int) -> list[Operation]:
    """Return what RandAugment chooses from, with equal chances.

    The 14 operations, and what a magnitude means to each, are torchvision's: those of Cubuk et al.,
    "RandAugment", 2020, without inversion. An operation with a direction stands here once for
    either, and all others twice.

    Args:
        magnitude: 0 (weakest) to 30.
        side: of the images, pixels.

    Returns:
        Functions of images (B, 3, side, side), float32 in [0, 1].
    """
    strength = magnitude / STRONGEST
    shear = math.degrees(math.atan(LARGEST_SHEAR * strength))
    shift = int(LARGEST_SHIFT * side * strength)
    change = LARGEST_CHANGE * strength
    bits = 8 - round(4 * strength)

    def affine(images: Tensor, translate: Sequence[int], angles: Sequence[float]) -> Tensor:
        corner = [0.0, 0.0] if any(angles) else None
        return transforms.affine(images, 0.0, list(translate), 1.0, list(angles), center=corner)

    def directed(sign: int) -> list[Operation]:
        return [
            lambda images: affine(images, (0, 0), (sign * shear, 0)),
            lambda images: affine(images, (0, 0), (0, sign * shear)),
            lambda images: affine(images, (sign * shift, 0), (0, 0)),
            lambda images: affine(images, (0, sign * shift), (0, 0)),
            lambda images: transforms.rotate(images, sign * LARGEST_ANGLE * strength),
            lambda images: transforms.adjust_brightness(images, 1 + sign * change),
            lambda images: transforms.adjust_saturation(images, 1 + sign * change),
            lambda images: transforms.adjust_contrast(images, 1 + sign * change),
            lambda images: transforms.adjust_sharpness(images, 1 + sign * change),
        ]

    others: list[Operation] = [
        lambda images: images,
        lambda images: transforms.posterize(images, bits),
        lambda images: transforms.solarize(images, 1 - strength),
        transforms.autocontrast,
        transforms.equalize,
    ]
    return [*directed(1), *directed(-1), *others, *others]


def apply_each(
    images: Tensor, chosen: Tensor, order: Tensor, choice: Sequence[Operation]
) -> Tensor:
    """Transform every image by the operation that is chosen for it.

    Args:
        images: (B, 3, S, S), float32 in [0, 1].
        chosen: positions in ``choice``, (B,) int64, on the host: it knows the sizes of the groups
            without waiting for the device.
        order: ``chosen.argsort()``, on the images' device.
        choice: the operations.
    """
    sizes = chosen.bincount(minlength=len(choice)).tolist()
    groups = zip(choice, images[order].split(sizes), strict=True)
    changed = torch.cat([operation(group) for operation, group in groups if len(group)])
    return torch.empty_like(changed).index_copy_(0, order, changed)
