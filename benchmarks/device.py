"""Timing and graph capture on the measured device."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Call, Timer, wall_clock


def synchronize(device: str) -> None:
    """Wait until the device has finished its work; on a CPU, do nothing."""
    if device == "cuda":
        torch.cuda.synchronize()


def timer(device: str) -> Timer:
    """Return a timer: CUDA events on a GPU, the wall clock elsewhere."""
    return event_clock if device == "cuda" else wall_clock


def event_clock(call: Call, times: int) -> float:
    """Return the mean seconds of a call between two CUDA events, gaps between kernels included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / times


def captured(call: Call) -> Call:
    """Return the call as a CUDA graph replay: the GPU's work, without the host's launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture needs everything initialised, on a side stream
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def launches(call: Call, device: str, steps: int = 2) -> list[dict[str, Any]]:
    """Return what one call launches: ``kernel``, ``count`` and total ``microseconds`` per call.

    On a CPU, which launches nothing, PyTorch's operators stand in for kernels.
    """
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    call()
    synchronize(device)
    with profile(activities=activities) as found:
        for _ in range(steps):
            call()
        synchronize(device)
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return _by_name(events, {"kernel", "gpu_memcpy", "gpu_memset"} if on_gpu else {"cpu_op"}, steps)


def _by_name(events: Sequence[dict[str, Any]], kinds: set[str], steps: int) -> list[dict[str, Any]]:
    durations: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") in kinds:
            durations[event["name"]].append(event["dur"])
    rows = [
        {"kernel": name, "count": len(each) / steps, "microseconds": sum(each) / steps}
        for name, each in durations.items()
    ]
    return sorted(rows, key=lambda row: -row["microseconds"])
