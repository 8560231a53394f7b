"""Learning rate schedules: detectron2's, and the polynomial one used for segmenters."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler, build_lr_scheduler
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

POLYNOMIAL = "WarmupPolyLR"
POWER = 0.9


def build_schedule(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Return the schedule named by ``SOLVER.LR_SCHEDULER_NAME``, including ``"WarmupPolyLR"``.

    The latter decays as ``(1 - step / MAX_ITER)^0.9``, as usual for PSPNet and DeepLab.
    """
    keys = cfg.SOLVER
    if keys.LR_SCHEDULER_NAME != POLYNOMIAL:
        return build_lr_scheduler(cfg, optimizer)
    warmed = WarmupParamScheduler(
        PolynomialDecayParamScheduler(1, POWER),
        keys.WARMUP_FACTOR,
        min(keys.WARMUP_ITERS / keys.MAX_ITER, 1.0),
        keys.WARMUP_METHOD,
    )
    return LRMultiplier(optimizer, multiplier=warmed, max_iter=keys.MAX_ITER)


def schedule_doubts(cfg: CfgNode) -> Iterator[str]:
    """Yield warnings about probable mistakes in a schedule, one sentence each."""
    keys = cfg.SOLVER
    unreached = [str(step) for step in keys.STEPS if step >= keys.MAX_ITER]
    if unreached and keys.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        yield (
            f"SOLVER.STEPS: the rate does not fall at {', '.join(unreached)}, beyond "
            f"SOLVER.MAX_ITER {keys.MAX_ITER}"
        )
    if keys.WARMUP_ITERS >= keys.MAX_ITER > 1:
        yield (
            f"SOLVER.WARMUP_ITERS: the rate rises over {keys.WARMUP_ITERS} steps, but "
            f"SOLVER.MAX_ITER ends the run after {keys.MAX_ITER}, before it peaks; set fewer"
        )
