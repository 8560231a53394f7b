"""Interleaved timing, its statistics, and their tables."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Call = Callable[[], object]
Timer = Callable[[Call, int], float]  # (call, times) -> seconds of one call


def wall_clock(call: Call, times: int) -> float:
    """Return the mean seconds of one call."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def interleave(
    calls: Mapping[str, Call],
    rounds: Mapping[str, int],
    *,
    sample_seconds: float = 0.02,
    timer: Timer = wall_clock,
) -> dict[str, list[float]]:
    """Time every call once per round, so that slowdowns of the machine affect all of them.

    Args:
        calls: variant -> what to time.
        rounds: variant -> number of rounds, from the first on, that it takes part in.
        sample_seconds: one sample repeats a short call for about this long.
        timer: measures one sample.

    Returns:
        Variant -> seconds of one call in each of its rounds.
    """
    times = {name: _times(call, sample_seconds, timer) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(max(rounds[name] for name in names)):
        # Each round starts with a different call, so that none always follows the same neighbour.
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn < rounds[name]:
                seconds[name].append(timer(calls[name], times[name]))
    return seconds


def _times(call: Call, sample_seconds: float, timer: Timer) -> int:
    """Return how often a sample repeats the call; also warm it up."""
    warm_up = timer(call, 1)
    if warm_up > 1:
        return 1
    return max(1, math.ceil(sample_seconds / max(timer(call, 1), 1e-9)))


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Return the spread of the per-round ratios, over the rounds that both took part in."""
    return Spread.of([a / b for a, b in zip(over, under)])


_RATIOS = (
    ("pcka", "products"),
    ("pcka", "products bfloat16"),
    ("pcka float32", "pcka"),
    ("pcka graph", "products"),
    ("loop", "pcka"),
    ("split loop", "pcka"),
    ("eager", "pcka"),
    ("strong eager", "pcka"),
    ("compiled eager", "pcka"),
    ("eager graph", "pcka graph"),
    ("strong eager graph", "pcka graph"),
    ("compiled eager graph", "pcka graph"),
)


def compare(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    loop_rounds: int,
    sample_seconds: float = 0.02,
    timer: Timer = wall_clock,
) -> dict[str, Any]:
    """Time all variants of one case; return ``seconds``, ``median_ms`` and ``ratios``, for JSON.

    With ``loop_rounds=0`` the loops are left out.
    """
    turns = {name: min(loop_rounds, rounds) if "loop" in name else rounds for name in calls}
    calls = {name: call for name, call in calls.items() if turns[name]}
    seconds = interleave(calls, turns, sample_seconds=sample_seconds, timer=timer)
    return {
        "seconds": seconds,
        "median_ms": {name: 1e3 * statistics.median(s) for name, s in seconds.items()},
        "ratios": {
            f"{over}/{under}": asdict(ratio(seconds[over], seconds[under]))
            for over, under in _RATIOS
            if over in seconds and under in seconds
        },
    }


def timing_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return one row per case: milliseconds of each variant, the ratios, and any ``figures``."""
    variants = _keys(record["median_ms"] for record in records)
    ratios = _keys(record["ratios"] for record in records)
    figures = _keys(record.get("figures", {}) for record in records)
    rows = []
    for record in records:
        row = [record["case"]["name"]]
        row += [_cell(record["median_ms"].get(name), "{:.3g}") for name in variants]
        spreads = [record["ratios"].get(name) for name in ratios]
        row += [str(Spread(**spread)) if spread else "" for spread in spreads]
        row += [_cell(record.get("figures", {}).get(name), "{:.3g}") for name in figures]
        rows.append(row)
    return markdown(["case", *(f"{name} (ms)" for name in variants), *ratios, *figures], rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with a left-aligned first column."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, marks, *rows)) + "\n"


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys of all mappings, in order of first appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
