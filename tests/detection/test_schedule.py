"""Learning rates over the steps."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg

from detection.schedule import build_schedule


def _rates(name, warmup):
    cfg = get_cfg()
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.MAX_ITER = name, 10
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR, cfg.SOLVER.STEPS = warmup, 0.1, (5,)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    schedule = build_schedule(cfg, optimizer)
    found = []
    for _ in range(10):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_a_polynomial_rate_falls_by_its_formula():
    expected = [(1 - step / 10) ** 0.9 for step in range(10)]
    assert _rates("WarmupPolyLR", 0) == pytest.approx(expected)
    assert _rates("WarmupPolyLR", 4)[4:] == pytest.approx(expected[4:])
    assert _rates("WarmupPolyLR", 4)[0] == pytest.approx(0.1)


def test_detectron2s_own_are_as_ever():
    assert _rates("WarmupMultiStepLR", 0) == pytest.approx([1.0] * 5 + [0.1] * 5)
