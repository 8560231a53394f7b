"""Learning rates over the steps."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg

from detection.schedule import build_schedule, schedule_doubts


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("SOLVER.STEPS", "(90, 900)"), "SOLVER.STEPS: the rate does not fall at 900, beyond"),
        (("SOLVER.STEPS", "(90, 300)"), "does not fall at 300, beyond SOLVER.MAX_ITER 300"),
        (("SOLVER.STEPS", "(900,)", "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"), ""),
        (("SOLVER.WARMUP_ITERS", "300"), "SOLVER.WARMUP_ITERS: the rate rises over 300 steps"),
        ((), ""),
    ],
)
def test_what_is_probably_not_meant_is_told(small_config, overrides, message):
    told = " ".join(schedule_doubts(small_config("student", *overrides)))
    assert message in told if message else not told
