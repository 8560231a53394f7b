"""Cost of a training step: time and peak memory."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pcka.analysis.memory import peak_growth
from pcka.distributed import from_first_process, rank
from pcka.engine.environment import describe_environment
from pcka.engine.run_folder import write_text

ROUNDS, WARM_UP_ROUNDS = 15, 2

Call = Callable[[], object]


@dataclass(frozen=True)
class Cost:
    """Cost of one training step: batch, teacher's forward pass, student's update.

    Attributes:
        milliseconds: per image, the median over the rounds.
        mebibytes: peak memory growth during the step, on top of models and optimizer.
    """

    milliseconds: float
    mebibytes: float


def median_seconds(
    rounds_of_calls: Iterator[Mapping[str, Call]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Time calls in turn, so that anything that slows the machine affects them all.

    Args:
        rounds_of_calls: yields each round's calls by name. The wait for a round counts towards each
            of its calls.
        rounds: number of timed rounds, after :data:`WARM_UP_ROUNDS`.
        device: the device that the calls run on.
    """
    seconds: dict[str, list[float]] = {}
    for turn in range(rounds + WARM_UP_ROUNDS):
        start = time.perf_counter()
        calls = next(rounds_of_calls)
        waited = time.perf_counter() - start
        for name, call in calls.items():
            taken = waited + _timed(call, device)
            if turn >= WARM_UP_ROUNDS:
                seconds.setdefault(name, []).append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _timed(call: Call, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_mebibytes(call: Call, device: torch.device) -> float:
    """Peak memory growth during a call, in MiB."""
    return peak_growth(call, device) / 2**20


def kept_costs(
    path: Path, settings: Mapping[str, str], measure: Callable[[], Mapping[str, Cost]]
) -> dict[str, Cost]:
    """Return the costs cached in a file, or measure them all and cache them there.

    Args:
        path: the cache file; a damaged one is rewritten.
        settings: name -> what its cost depends on, see :func:`settings_digest`. The file is used if
            it holds the costs of all names with the same settings.
        measure: returns the costs of all names; called in every process.
    """
    kept = from_first_process(_read(path))
    if all(settings[name] == kept.get(name, {}).get("settings") for name in settings):
        return {name: Cost(**kept[name]["cost"]) for name in settings}
    costs = dict(measure())
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = {n: {"settings": settings[n], "cost": asdict(costs[n])} for n in costs}
        write_text(path, json.dumps(entries, indent=2))
    return costs


def settings_digest(text: str, device: torch.device) -> str:
    """A digest of what a step's cost depends on: its settings and this machine."""
    about = describe_environment(0, device)
    machine = {key: about[key] for key in ("torch", "device", "threads", "processes")}
    return hashlib.sha256(f"{text}{machine}".encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
