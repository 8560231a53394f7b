"""Time and memory of a training step, and what follows for the whole run."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pcka.analysis.memory import peak_growth
from pcka.engine.doctor import PASS, WARN, Verdict

TIMED_STEPS = 5
LONG_ENOUGH = 30.0  # seconds of timed steps, after which timing stops
MOST_OF_MEMORY = 0.9  # share beyond which other uses of memory may get in the way


class StepCost(NamedTuple):
    """Cost of a step.

    Attributes:
        seconds: median duration.
        peak: peak memory growth during the step, bytes.
    """

    seconds: float
    peak: int

    def verdict(self, spans: Mapping[str, float], device: torch.device, batch_key: str) -> Verdict:
        """Time and memory in words; a warning if memory is short.

        Args:
            spans: activity -> seconds that it takes.
            device: of the steps.
            batch_key: configuration key that makes steps smaller.
        """
        told = ", ".join(f"{duration(seconds)} {what}" for what, seconds in spans.items())
        text = f"{1e3 * self.seconds:.0f} ms and {self.peak / 2**20:.0f} MiB a step; {told}"
        if self.peak > MOST_OF_MEMORY * (total := _memory(device)):
            return Verdict(WARN, f"{text}; out of {total / 2**20:.0f} MiB: lower {batch_key}")
        return Verdict(PASS, text)


def step_cost(step: Callable[[], object], device: torch.device) -> StepCost:
    """Measure a step that waits for its device; run one before, to warm up."""
    taken: list[float] = []
    while len(taken) < TIMED_STEPS and sum(taken) < LONG_ENOUGH:
        taken.append(seconds_of(step))
    return StepCost(statistics.median(taken), peak_growth(step, device))


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def duration(seconds: float) -> str:
    """A duration in the largest unit in which it is at least 1."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def tensor_bytes(value: object) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def _memory(device: torch.device) -> int:
    """Total memory of the GPU, or of the machine, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
