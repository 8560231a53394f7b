"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable

import torch
from fvcore.common.config import CfgNode
from torch import nn


def build_optimizer(cfg: CfgNode, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """Return SGD with the settings of ``SOLVER``."""
    solver = cfg.SOLVER
    return torch.optim.SGD(
        parameters,
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
    )


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
