from __future__ import annotations

import os

import pytest
import torch

from pcka.analysis.memory import peak_growth

MIB = 2**20
SLACK = 8 * MIB  # of the process beside what the call allocates

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="resident memory is read from Linux"
)


@pytest.fixture(autouse=True)
def warm():
    """Whatever torch sets up at the first call is there."""
    fill(1)


def fill(mebibytes: int) -> torch.Tensor:
    return torch.ones(mebibytes * MIB, dtype=torch.uint8)


def test_the_peak_counts_though_it_is_gone_at_the_end():
    def call():
        fill(64)
        fill(16)

    assert 64 * MIB - SLACK <= peak_growth(call) <= 64 * MIB + SLACK


def test_what_is_held_at_once_adds_up():
    grown = peak_growth(lambda: (fill(32), fill(48)))
    assert 80 * MIB - SLACK <= grown <= 80 * MIB + SLACK


def test_only_what_is_added_during_the_call_counts():
    held = fill(64)
    del held
    fill(128)  # a higher peak, before
    assert peak_growth(lambda: None) <= SLACK
    kept = fill(64)
    assert 16 * MIB - SLACK <= peak_growth(lambda: fill(16)) <= 16 * MIB + SLACK
    assert len(kept) == 64 * MIB


def test_what_malloc_keeps_of_earlier_calls_is_no_memory_to_start_with():
    def call():
        # Blocks that malloc takes from its heap; it cannot give back what lies below the last one.
        return [torch.ones(16 * 1024, dtype=torch.uint8) for _ in range(64 * 64)][-1]

    pin = call()
    assert 64 * MIB - SLACK <= peak_growth(call) <= 64 * MIB + SLACK
    assert pin.all()


def test_a_device_may_be_named():
    grown = peak_growth(lambda: fill(32), torch.device("cpu"))
    assert 32 * MIB - SLACK <= grown <= 32 * MIB + SLACK


def test_on_cuda_the_allocator_is_asked(monkeypatch):
    calls = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, name=name: calls.append(name))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 100)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 350)
    assert peak_growth(lambda: calls.append("call"), torch.device("cuda")) == 250
    assert calls == ["synchronize", "reset_peak_memory_stats", "call", "synchronize"]
