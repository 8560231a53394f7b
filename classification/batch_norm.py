"""Running statistics of batch norm: their momentum, when they lag, and how to re-estimate them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from classification.data import ImageSet
from classification.data.augmentation import augmented_batches
from pcka.engine.config import ConfigError

USUAL_MOMENTUM = 0.1  # torch's default
NEAR_CHANCE = 1.1  # at most this many times the accuracy of always predicting the largest class
FALLEN = 0.95  # share of the first epoch's loss


def running_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return path -> batch norm, for those that use running statistics in evaluation mode."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def set_momentum(model: nn.Module, momentum: float) -> None:
    """Set the momentum of the running statistics: the weight of a new batch in them."""
    for norm in running_norms(model).values():
        norm.momentum = momentum


def recalibrate(
    model: nn.Module, pixels: nn.Module, data: ImageSet, cfg: CfgNode, images: int
) -> None:
    """Re-estimate the running statistics: their mean over batches as in training.

    Args:
        model: (B, 3, S, S) -> logits; only its running statistics change, in place.
        pixels: the model's pixel normalisation.
        data: training images, on the model's device.
        cfg: determines the batches, as in training.
        images: how many to use at least, or all if there are fewer.

    Raises:
        ConfigError: the model has no running statistics.
    """
    if not running_norms(model):
        raise ConfigError(
            "--recalibrate-bn: the model has no batch norm with running statistics; leave it out"
        )
    batches = augmented_batches(data, cfg, epoch=0)
    count = -(-images // cfg.SOLVER.BATCH_SIZE)
    torch.manual_seed(cfg.SEED)  # for dropout, which is active as in training
    update_bn((pixels(batch.images) for batch in islice(batches, count)), model)


def lagging(
    model: nn.Module, data: ImageSet, top1: float, losses: Sequence[float]
) -> Iterator[str]:
    """Yield a warning if evaluation is at chance although the loss falls.

    Args:
        model: the evaluated model.
        data: the evaluation images.
        top1: accuracy, percent.
        losses: total loss of every epoch so far.
    """
    chance = 100 * float(torch.bincount(data.labels).max()) / len(data)
    norms = running_norms(model)
    if not norms or len(losses) < 2 or top1 > NEAR_CHANCE * chance:
        return
    if not losses[-1] < FALLEN * losses[0]:
        return
    path, norm = min(norms.items(), key=lambda item: item[1].momentum or 1.0)
    faster = f"; in training they follow faster with STUDENT.BN_MOMENTUM {USUAL_MOMENTUM}"
    yield (
        f"the evaluation is at chance ({top1:.2f} %) although the loss falls (from {losses[0]:.4g} "
        f"to {losses[-1]:.4g}): the running statistics of batch norm may lag behind the weights "
        f"(momentum {norm.momentum} at {path!r}). evaluate.py --recalibrate-bn re-estimates them"
        + (faster if (norm.momentum or 1.0) < USUAL_MOMENTUM else "")
    )
