"""Time and memory of a step."""

from __future__ import annotations

import itertools

import pytest
import torch

from pcka.engine import step_cost as module
from pcka.engine.doctor import PASS, WARN
from pcka.engine.step_cost import StepCost, duration, step_cost, tensor_bytes

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """``clock(step)``: seconds go by only as a step says."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module, "peak_growth", lambda call, device: call() or 7)

    def passing(lengths):
        given = iter(lengths)

        def step():
            now[0] += next(given)

        return step

    return passing


def test_a_cost_is_the_median_of_some_steps(clock):
    assert step_cost(clock([1.0, 9.0, 2.0, 3.0, 2.5, 0.0]), CPU) == StepCost(2.5, 7)


def test_of_long_steps_fewer_are_timed(clock):
    taken = itertools.count()

    def lengths():
        for _ in taken:
            yield 40.0

    assert step_cost(clock(lengths()), CPU) == StepCost(40.0, 7)
    assert next(taken) == 2  # one timed, and one whose memory is measured


def test_a_cost_in_words_warns_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(module, "_memory", lambda _: 100 * 2**20)
    spans = {"an epoch": 90.0, "the run": 7200.0}
    told = StepCost(0.25, 80 * 2**20).verdict(spans, CPU, "SOLVER.BATCH_SIZE")
    assert told == (PASS, "250 ms and 80 MiB a step; 1.5 min an epoch, 2.0 h the run")
    told = StepCost(0.25, 95 * 2**20).verdict(spans, CPU, "SOLVER.BATCH_SIZE")
    assert told.status == WARN
    assert told.text.endswith("out of 100 MiB: lower SOLVER.BATCH_SIZE")


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2.0 s"), (90, "1.5 min"), (9000, "2.5 h"), (129600, "1.5 days")]
)
def test_durations_have_the_unit_of_their_size(seconds, text):
    assert duration(seconds) == text


def test_bytes_are_those_of_all_tensors():
    one = torch.zeros(3)
    assert tensor_bytes({"a": [one, (one, 5)], "b": {"c": one.double()}, "d": None}) == 48
