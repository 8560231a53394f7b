from __future__ import annotations

import pytest

from classification.solver import distillation_scale, learning_rate


def test_multistep_drops_after_the_milestones(tiny_config):
    cfg = tiny_config(
        **{"SOLVER.SCHEDULE": "multistep", "SOLVER.MILESTONES": "[3, 1]", "SOLVER.BASE_LR": 2.0}
        | {"SOLVER.GAMMA": 0.1, "SOLVER.WARMUP_EPOCHS": 0}
    )
    rates = [learning_rate(cfg, progress) for progress in (0, 0.99, 1, 2.9, 3)]
    assert rates == pytest.approx([2, 2, 0.2, 0.2, 0.02])


def test_a_cosine_falls_to_zero_over_the_epochs(tiny_config):
    cfg = tiny_config(
        **{"SOLVER.SCHEDULE": "cosine", "SOLVER.EPOCHS": 4, "SOLVER.BASE_LR": 2.0}
        | {"SOLVER.WARMUP_EPOCHS": 0}
    )
    rates = [learning_rate(cfg, progress) for progress in (0, 1, 2, 4)]
    assert rates == pytest.approx([2, 1 + 2**-0.5, 1, 0])


def test_the_rate_rises_over_the_warm_up(tiny_config):
    cfg = tiny_config(
        **{"SOLVER.SCHEDULE": "multistep", "SOLVER.MILESTONES": "[]", "SOLVER.BASE_LR": 2.0}
        | {"SOLVER.WARMUP_EPOCHS": 0.5}
    )
    rates = [learning_rate(cfg, progress) for progress in (0, 0.25, 0.5, 1)]
    assert rates == pytest.approx([0, 1, 2, 2])


def test_distillation_rises_over_its_share_of_the_run(tiny_config):
    cfg = tiny_config(**{"DISTILL.WARMUP": 0.25, "SOLVER.EPOCHS": 8})
    scales = [distillation_scale(cfg, progress) for progress in (0, 0.5, 1, 1.9, 2, 7)]
    assert scales == pytest.approx([0, 0.25, 0.5, 0.95, 1, 1])


def test_distillation_without_a_warm_up_is_whole_from_the_start(tiny_config):
    assert distillation_scale(tiny_config(), 0) == 1
