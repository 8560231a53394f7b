"""The section SOLVER: the optimizer, its learning rate, and what else is scheduled by update."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from classification.dot import DistillationOriented
from pcka.engine.config import ConfigError


def check_solver(solver: CfgNode) -> None:
    """Refuse contradictory values of the section.

    Raises:
        ConfigError: the key is named.
    """
    if solver.NESTEROV and not solver.MOMENTUM:
        raise ConfigError("SOLVER.NESTEROV: needs a SOLVER.MOMENTUM above 0, got 0")
    if min(milestones := solver.MILESTONES, default=1) < 1:
        raise ConfigError(f"SOLVER.MILESTONES: expected epochs, at least 1, got {milestones}")
    if len(solver.BETAS) != 2 or not all(0 <= beta < 1 for beta in solver.BETAS):
        raise ConfigError(
            f"SOLVER.BETAS: expected two numbers from 0 to below 1, got {solver.BETAS}"
        )
    if solver.EMA_DECAY == 1:
        raise ConfigError("SOLVER.EMA_DECAY: with 1 nothing is averaged; use 0.999, or 0 for none")
    if solver.SCHEDULE == "cosine" and solver.MIN_LR > solver.BASE_LR:
        raise ConfigError(
            f"SOLVER.MIN_LR: expected at most SOLVER.BASE_LR {solver.BASE_LR}, got {solver.MIN_LR}"
        )
    if solver.SCHEDULE == "onecycle" and solver.WARMUP_EPOCHS:
        raise ConfigError(
            "SOLVER.WARMUP_EPOCHS: onecycle rises by itself, over SOLVER.ONECYCLE_RISE of the "
            f"epochs; expected 0, got {solver.WARMUP_EPOCHS}"
        )


def check_dot(solver: CfgNode, delta: float) -> None:
    """Refuse settings that DOT, with its two momenta, cannot be combined with.

    Args:
        solver: the section.
        delta: ``DISTILL.DOT_DELTA``, above 0.

    Raises:
        ConfigError: the key is named.
    """
    if not delta <= solver.MOMENTUM < 1 - delta:
        raise ConfigError(
            "DISTILL.DOT_DELTA: expected at most SOLVER.MOMENTUM, and a sum of both below 1, "
            f"got {delta} with {solver.MOMENTUM}"
        )
    fitting = {"OPTIMIZER": "sgd", "NESTEROV": False, "ACCUMULATE": 1, "CLIP_GRADIENTS": 0.0}
    for key, value in fitting.items():
        if solver[key] != value:
            raise ConfigError(
                f"DISTILL.DOT_DELTA: requires plain SGD; set SOLVER.{key} {value}, got "
                f"{solver[key]}"
            )


def build_optimizer(cfg: CfgNode, trained: nn.Module) -> Optimizer:
    """Return the optimizer of all parameters of a module, fused except for DOT.

    Args:
        cfg: the section ``SOLVER`` is read.
        trained: the distiller: student, adapters, and the losses' own parameters.
    """
    solver = cfg.SOLVER
    groups: list[dict] = [{"params": list(trained.parameters())}]
    if not solver.DECAY_NORMS_AND_BIASES:
        exempt = _exempt(trained)
        decayed = [p for p in trained.parameters() if id(p) not in exempt]
        spared = [p for p in trained.parameters() if id(p) in exempt]
        groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    shared: dict[str, Any] = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if delta := cfg.DISTILL.DOT_DELTA:
        return DistillationOriented(groups, momentum=solver.MOMENTUM, delta=delta, **shared)
    shared["fused"] = True
    if solver.OPTIMIZER == "adamw":
        return AdamW(groups, betas=tuple(solver.BETAS), eps=solver.EPS, **shared)
    return SGD(groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **shared)


def _exempt(trained: nn.Module) -> set[int]:
    """Return the ids of 1-D parameters and of those in the student's ``no_weight_decay()``."""
    student: Any = getattr(trained, "student", trained)
    named: Collection[str] = getattr(student, "no_weight_decay", set)()
    told = {id(p) for name, p in student.named_parameters() if name in named}
    return told | {id(p) for p in trained.parameters() if p.dim() <= 1}


def read_rate_from(rate: Tensor, optimizer: Optimizer) -> None:
    """Make an optimizer read its rate from the device, so that a recorded step sees changes."""
    for group in optimizer.param_groups:
        group["lr"] = rate
        if "capturable" in group:  # a loaded state may say otherwise, from another device
            group["capturable"] = rate.is_cuda


def optimizer_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Return the state that a step changes besides the parameters.

    Missing state is created as a first step starts from it, to be restored after a recording.
    """
    if isinstance(optimizer, DistillationOriented):
        return optimizer.velocities()
    tensors = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name in _state_names(group):
                if state.get(name) is None:
                    zero = torch.zeros_like(parameter) if name != "step" else _step(parameter)
                    state[name] = zero
                tensors.append(state[name])
    return tensors


def _state_names(group: dict) -> tuple[str, ...]:
    if "betas" in group:
        return ("step", "exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if group["momentum"] else ()


def _step(parameter: Tensor) -> Tensor:
    """Return the step counter that AdamW keeps per parameter."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device)


def learning_rate(cfg: CfgNode, progress: float, update: float = 0.0) -> float:
    """Return the rate of the update that starts at ``progress``.

    ``BASE_LR`` times ``GAMMA^(milestones passed)`` (multistep), or from ``BASE_LR`` to ``MIN_LR``
    by ``(1 + cos(pi * progress / EPOCHS)) / 2`` (cosine); both times ``progress / WARMUP_EPOCHS``
    while that is below 1. One-cycle is torch's ``OneCycleLR`` with cosines and a constant momentum:
    from ``BASE_LR / ONECYCLE_DIV`` up to ``BASE_LR`` and down to the initial rate divided by
    ``ONECYCLE_FINAL_DIV``.

    Args:
        cfg: the section ``SOLVER`` is read.
        progress: epochs trained so far, with a fraction within an epoch.
        update: the fraction of an epoch per update; one-cycle ends with the last update.
    """
    solver = cfg.SOLVER
    if solver.SCHEDULE == "onecycle":
        return solver.BASE_LR * _one_cycle(solver, progress, update)
    if solver.SCHEDULE == "cosine":
        floor = solver.MIN_LR / solver.BASE_LR if solver.MIN_LR else 0.0
        factor = floor + (1 - floor) * _falling_cosine(progress, solver.EPOCHS)
    else:
        factor = solver.GAMMA ** bisect_right(sorted(solver.MILESTONES), progress)
    if progress < solver.WARMUP_EPOCHS:
        factor *= progress / solver.WARMUP_EPOCHS
    return solver.BASE_LR * factor


def _one_cycle(solver: CfgNode, progress: float, update: float) -> float:
    start = 1 / solver.ONECYCLE_DIV
    end = start / solver.ONECYCLE_FINAL_DIV
    top, last = solver.ONECYCLE_RISE * solver.EPOCHS - update, solver.EPOCHS - update
    if top > 0 and progress <= top:
        return 1 + (start - 1) * _falling_cosine(progress, top)
    return end + (1 - end) * (_falling_cosine(progress - top, last - top) if last > top else 1.0)


def _falling_cosine(passed: float, whole: float) -> float:
    """Return a half cosine: 1 at 0, 0 at ``whole``."""
    return (1 + math.cos(math.pi * passed / whole)) / 2


def distillation_scale(cfg: CfgNode, progress: float) -> float:
    """Return the factor of the distillation terms: linear up to 1 over the share ``WARMUP``.

    Args:
        cfg: ``DISTILL.WARMUP`` and ``SOLVER.EPOCHS`` are read.
        progress: epochs trained so far, with a fraction within an epoch.
    """
    warmup = cfg.DISTILL.WARMUP * cfg.SOLVER.EPOCHS
    return progress / warmup if progress < warmup else 1.0


def average_decay(cfg: CfgNode, updates: int) -> float:
    """Return the decay of the average of the student's weights after ``updates`` updates.

    ``min(EMA_DECAY, 1 - (1 + updates)^(-2/3))``, as in timm's ``ModelEmaV3`` with warm-up: the
    average starts from the first trained weights, and short runs average as well.
    """
    return min(cfg.SOLVER.EMA_DECAY, 1 - (1 + updates) ** (-2 / 3))
