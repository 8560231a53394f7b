"""Augmentation of whole batches on the training device, wherever their images come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from classification.data.batches import (
    ERASING_STREAM,
    RAND_AUGMENT_STREAM,
    Batch,
    mixes,
    random_stream,
    steps_per_epoch,
    training_share,
)
from classification.data.image_set import ImageSet

ERASED_AREA = (0.02, 0.33)  # share of the image
ERASED_SHAPE = (0.3, 3.3)  # height / width

Share = Callable[[Tensor], Tensor]  # values of an epoch's images (N, ...) -> (steps, b, ...)


def augmented_batches(
    train_set: ImageSet, cfg: CfgNode, epoch: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Yield :meth:`ImageSet.training_batches`, changed by RandAugment, erasing, mixup and cutmix.

    All random numbers follow from ``SEED``, the epoch, and an image's position in the epoch's
    order, which follows from the first two; a mixture applies to a whole batch. They are drawn on
    the host.

    Args:
        train_set: the images.
        cfg: in addition, DATA.RANDAUGMENT, ERASING, MIXUP and CUTMIX are read.
        epoch: 0 for the first.
        rank: rank of this process.
        world_size: number of processes.

    Raises:
        ConfigError: the set is too small for a batch, or the processes cannot share it evenly (in
            pairs if images are mixed).
    """
    batches = train_set.training_batches(cfg, epoch, rank, world_size)
    steps, size = steps_per_epoch(train_set, cfg, world_size), cfg.SOLVER.BATCH_SIZE
    share = partial(training_share, steps=steps, batch_size=size, rank=rank, world=world_size)
    if cfg.DATA.RANDAUGMENT:
        batches = _rand_augmented(batches, train_set, cfg, epoch, share)
    if cfg.DATA.ERASING:
        batches = _erased(batches, train_set, cfg, epoch, share)
    if mixes(cfg.DATA):
        from classification.data.mixing import mix, mixtures  # few runs do

        classes = len(train_set.classes)
        mixed = zip(batches, mixtures(cfg, epoch, steps))
        batches = (mix(batch, mixture, classes) for batch, mixture in mixed)
    return batches


def _rand_augmented(
    batches: Iterable[Batch], train_set: ImageSet, cfg: CfgNode, epoch: int, share: Share
) -> Iterator[Batch]:
    from classification.data.rand_augment import apply_each, operations  # slow to import

    times, magnitude = cfg.DATA.RANDAUGMENT
    choice = operations(magnitude, cfg.DATA.IMAGE_SIZE, train_set.device)
    stream = random_stream(cfg.SEED, epoch, RAND_AUGMENT_STREAM)
    chosen = share(torch.randint(len(choice), (len(train_set), times), generator=stream)).mT
    orders = chosen.argsort(stable=True).to(train_set.device)
    for batch, operations_of, orders_of in zip(batches, chosen, orders):
        images = batch.images
        for of_each, order in zip(operations_of, orders_of, strict=True):
            images = apply_each(images, of_each, order, choice)
        yield batch._replace(images=images)


def _erased(
    batches: Iterable[Batch], train_set: ImageSet, cfg: CfgNode, epoch: int, share: Share
) -> Iterator[Batch]:
    stream = random_stream(cfg.SEED, epoch, ERASING_STREAM)
    boxes = erasing_boxes(len(train_set), cfg.DATA.IMAGE_SIZE, cfg.DATA.ERASING, stream)
    colours = torch.rand(len(train_set), 3, generator=stream)
    drawn = (share(values).to(train_set.device) for values in (boxes, colours))
    for batch, boxes_of, colours_of in zip(batches, *drawn):
        yield batch._replace(images=erase(batch.images, boxes_of, colours_of))


def erasing_boxes(count: int, side: int, probability: float, stream: torch.Generator) -> Tensor:
    """Draw the box to erase in each image (Zhong et al., "Random Erasing", AAAI 2020).

    Its area is uniform between 2 and 33 % of the image's, the logarithm of height / width between
    those of 0.3 and 3.3, as in torchvision; its sides are limited to the image's. Its position
    within the image is uniform.

    Args:
        count: number of images.
        side: side of the images, pixels.
        probability: probability that an image has a box; the others get an empty one.
        stream: generator to draw from.

    Returns:
        Top, bottom, left and right edge, pixels, (count, 4) int64.
    """
    drawn = torch.rand(count, 5, generator=stream, dtype=torch.float64)
    chance, area, shape, row, column = drawn.unbind(1)
    area = side**2 * _between(*ERASED_AREA, area)
    shape = _between(math.log(ERASED_SHAPE[0]), math.log(ERASED_SHAPE[1]), shape).exp()
    edges = []
    for place, length in ((row, (area * shape).sqrt()), (column, (area / shape).sqrt())):
        length = length.round().clamp(max=side) * (chance < probability)
        start = (place * (side - length + 1)).floor()
        edges += [start, start + length]
    return torch.stack(edges, dim=1).long()


def _between(low: float, high: float, place: Tensor) -> Tensor:
    return low + (high - low) * place


def erase(images: Tensor, boxes: Tensor, colours: Tensor) -> Tensor:
    """Fill a box of each image with one colour.

    Args:
        images: (B, 3, S, S).
        boxes: top, bottom, left and right edge, (B, 4) int64; an empty one erases nothing.
        colours: (B, 3).

    Returns:
        (B, 3, S, S).
    """
    line = torch.arange(images.shape[-1], device=images.device)
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    rows, columns = (line >= top) & (line < bottom), (line >= left) & (line < right)
    erased = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(erased, colours[:, :, None, None], images)
