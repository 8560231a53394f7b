from __future__ import annotations

import importlib.util

import pytest

from tools.gpu.stages import STAGES, Stage, choose, together


def names(stages):
    return [stage.name for stage in stages]


def test_every_stage_is_a_module_that_can_be_run():
    for stage in STAGES:
        assert importlib.util.find_spec(stage.module) is not None
    assert len(set(names(STAGES))) == len(STAGES)


def test_the_stages_fit_the_minutes_that_a_machine_is_lent():
    def seconds(stages):
        return sum(max(stage.seconds for stage in group) for group in together(stages))

    assert seconds(STAGES) <= 540
    assert seconds([stage for stage in STAGES if stage.name != "throughput"]) <= 300


def test_what_measures_time_runs_by_itself():
    stages = [
        Stage("a", "m", 1),
        Stage("b", "m", 1, alone=False),
        Stage("c", "m", 1, alone=False),
        Stage("d", "m", 1),
        Stage("e", "m", 1, alone=False),
    ]
    assert [names(group) for group in together(stages)] == [["a"], ["b", "c"], ["d"], ["e"]]


def test_stages_are_chosen_by_name_and_the_needed_ones_stay():
    assert names(choose(["ncu", "operators"], [])) == ["environment", "operators", "ncu"]
    assert names(choose([], ["ncu", "environment"])) == [n for n in names(STAGES) if n != "ncu"]
    with pytest.raises(ValueError, match=r"unknown stage 'ncuu'; available: environment, "):
        choose(["ncuu"], [])
