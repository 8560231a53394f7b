"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn


def build_optimizer(
    cfg: CfgNode, parameters: Iterable[nn.Parameter], rate: Tensor
) -> torch.optim.SGD:
    """Return SGD with the settings of ``SOLVER``.

    Args:
        cfg: the section ``SOLVER`` is read.
        parameters: to train.
        rate: the learning rate, a scalar on their device; every step reads it anew.
    """
    solver = cfg.SOLVER
    optimizer = torch.optim.SGD(
        parameters,
        fused=True,
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


def learning_rate(cfg: CfgNode, progress: float) -> float:
    """Return the rate of the step that starts at ``progress``.

    ``BASE_LR`` times ``GAMMA^(milestones passed)`` (multistep) or ``(1 + cos(pi * progress /
    EPOCHS)) / 2`` (cosine), times ``progress / WARMUP_EPOCHS`` while that is below 1.

    Args:
        cfg: the section ``SOLVER`` is read.
        progress: epochs trained so far, with a fraction within an epoch.
    """
    solver = cfg.SOLVER
    if solver.SCHEDULE == "cosine":
        factor = (1 + math.cos(math.pi * progress / solver.EPOCHS)) / 2
    else:
        factor = solver.GAMMA ** bisect_right(sorted(solver.MILESTONES), progress)
    if progress < solver.WARMUP_EPOCHS:
        factor *= progress / solver.WARMUP_EPOCHS
    return solver.BASE_LR * factor


def unreached_milestones(cfg: CfgNode) -> list[int]:
    """Return the milestones of a multistep schedule that lie at or behind its last epoch."""
    solver = cfg.SOLVER
    if solver.SCHEDULE != "multistep":
        return []
    return [milestone for milestone in solver.MILESTONES if milestone >= solver.EPOCHS]


def distillation_scale(cfg: CfgNode, progress: float) -> float:
    """Return the factor of the distillation terms: linear up to 1 in the share ``WARMUP`` of a run.

    Args:
        cfg: ``DISTILL.WARMUP`` and ``SOLVER.EPOCHS`` are read.
        progress: epochs trained so far, with a fraction within an epoch.
    """
    warmup = cfg.DISTILL.WARMUP * cfg.SOLVER.EPOCHS
    return progress / warmup if progress < warmup else 1.0
