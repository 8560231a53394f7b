"""RandAugment on whole batches: images with the same operation are transformed together."""

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
LARGEST_CHANGE = 0.9  # of the colour factors
AT_ONCE = 2**20  # bytes of images that a CPU transforms at once, so that they stay in its cache

Operation = Callable[[Tensor], Tensor]


def operations(magnitude: int, side: int, device: torch.device | str = "cpu") -> list[Operation]:
    """Return the operations that RandAugment chooses from with equal probability.

    The 14 operations, and the meaning of a magnitude for each, are torchvision's: those of Cubuk et
    al., "RandAugment", 2020, without inversion. An operation with a direction is listed once per
    direction, all others twice.

    Args:
        magnitude: 0 (weakest) to 30.
        side: side of the images, pixels.
        device: device of the images.

    Returns:
        Functions of images (B, 3, side, side), float32 in [0, 1].
    """
    strength = magnitude / STRONGEST
    shear = math.degrees(math.atan(LARGEST_SHEAR * strength))
    shift = int(LARGEST_SHIFT * side * strength)
    change = LARGEST_CHANGE * strength
    bits = 8 - round(4 * strength)

    def affine(translate: Sequence[int], angles: Sequence[float]) -> Operation:
        corner = [0.0, 0.0] if any(angles) else None
        return _moving(
            lambda images: transforms.affine(
                images, 0.0, list(translate), 1.0, list(angles), center=corner
            ),
            *(side, device),
        )

    def directed(sign: int) -> list[Operation]:
        angle = sign * LARGEST_ANGLE * strength
        return [
            affine((0, 0), (sign * shear, 0)),
            affine((0, 0), (0, sign * shear)),
            affine((sign * shift, 0), (0, 0)),
            affine((0, sign * shift), (0, 0)),
            _moving(lambda images: transforms.rotate(images, angle), side, device),
            lambda images: transforms.adjust_brightness(images, 1 + sign * change),
            lambda images: transforms.adjust_saturation(images, 1 + sign * change),
            lambda images: transforms.adjust_contrast(images, 1 + sign * change),
            lambda images: sharpen(images, 1 + sign * change),
        ]

    others: list[Operation] = [
        lambda images: images,
        lambda images: transforms.posterize(images, bits),
        lambda images: transforms.solarize(images, 1 - strength),
        transforms.autocontrast,
        transforms.equalize,
    ]
    return [*directed(1), *directed(-1), *others, *others]


def _moving(move: Operation, side: int, device: torch.device | str) -> Operation:
    """Return an operation that takes each pixel from another place, or makes it black.

    The places are found once, by moving an image of pixel numbers: computing them for every image
    would take longer than everything else.
    """
    numbers = torch.arange(1.0, side * side + 1).view(1, 1, side, side)
    came_from = move(numbers).flatten().to(device)  # 0 is black
    inside = (came_from > 0).to(numbers.dtype)
    places = (came_from - inside).long()

    def moved(images: Tensor) -> Tensor:
        flat = images.flatten(2)
        return flat.gather(2, places.expand_as(flat)).mul_(inside).view_as(images)

    return moved


def sharpen(images: Tensor, factor: float) -> Tensor:
    """torchvision's ``adjust_sharpness`` without its convolution, which is slow on a CPU.

    ``x + (1 - factor) (s - x)`` within [0, 1], where ``s = (b + 4 x) / 13`` and ``b`` is the sum of
    the 3 x 3 neighbourhood; the outermost pixels do not change.

    Args:
        images: (B, 3, S, S), float32 in [0, 1].
        factor: 0 blurs, 1 changes nothing, 2 sharpens.
    """
    if min(images.shape[-2:]) <= 2:
        return images
    rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    share = (1 - factor) / 13
    sharpened = images.clone()
    sharpened[..., 1:-1, 1:-1].mul_(1 - 9 * share).add_(box, alpha=share).clamp_(0, 1)
    return sharpened


def apply_each(
    images: Tensor, chosen: Tensor, order: Tensor, choice: Sequence[Operation]
) -> Tensor:
    """Transform every image in place by the operation chosen for it.

    Args:
        images: (B, 3, S, S), float32 in [0, 1].
        chosen: positions in ``choice``, (B,) int64, on the host, which thus knows the sizes of the
            groups without waiting for the device.
        order: ``chosen.argsort()``, on the images' device.
        choice: the operations.

    Returns:
        The images.
    """
    at_once = len(images) if images.is_cuda else max(AT_ONCE // images[0].nbytes, 1)
    sizes = chosen.bincount(minlength=len(choice)).tolist()
    for operation, group in zip(choice, order.split(sizes), strict=True):
        for some in group.split(at_once):
            if len(some):
                images.index_copy_(0, some, operation(images[some]))
    return images
