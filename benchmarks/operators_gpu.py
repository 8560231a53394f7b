"""How fast the operators are on a GPU, beside loops, eager PyTorch and the bare products.

As ``operators.py``, and: CUDA events time each call, after a write that empties the L2 cache and
keeps the GPU busy while the call is queued; ``pcka graph`` is the same step replayed as a CUDA
graph; memory is what the allocator hands out at most beyond what was there before. GB/s count the
least traffic (both maps read, the gradients written), TFLOP/s the operations of the bare products.

Exits with 2 where there is no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import report
from benchmarks.baselines import Products
from benchmarks.cases import Case
from benchmarks.harness import Call, compare, timing_table
from benchmarks.operators import plot_times
from benchmarks.variants import alignments, step, timed_calls

_FLUSH_BYTES = 1 << 28  # more than any L2 cache holds


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table and write the files; returns the records."""
    parser = report.parser("Time the operators and their baselines on a GPU.")
    report.add_cases(parser)
    report.add_rounds(parser, rounds=21, loop_rounds=3)
    parser.add_argument("--peak-gbs", type=float, help="the GPU's memory bandwidth, GB/s")
    parser.add_argument("--peak-tflops", type=float, help="its float32 matrix rate, TFLOP/s")
    options = parser.parse_args(arguments)
    cases = report.chosen_cases(parser, options)
    if not torch.cuda.is_available():
        print("benchmarks.operators_gpu: torch sees no GPU here", file=sys.stderr)
        raise SystemExit(2)
    environment = report.start("cuda", options)
    timer, records = FlushedEvents(), []
    for case in cases:
        memory = _peak_memory(case, options.seed)
        calls = timed_calls(case, options.seed, "cuda")
        calls["pcka graph"] = captured(calls["pcka"])
        timings = compare(calls, timer=timer, **report.effort(options))
        achieved = rates(case, timings["median_ms"], options.peak_gbs, options.peak_tflops)
        records.append({"case": case.describe(), **timings, "figures": {**achieved, **memory}})
        del calls
        torch.cuda.empty_cache()
    print(timing_table(records))
    peaks = {"peak_gbs": options.peak_gbs, "peak_tflops": options.peak_tflops}
    report.write(options.output, "operators_gpu", {**environment, **peaks}, records)
    if options.output is not None:
        plot_times(options.output / "operators_gpu.png", records)
    return records


class FlushedEvents:
    """A timer by CUDA events; before every call the L2 cache is overwritten."""

    def __init__(self) -> None:
        self._ballast = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Call, times: int) -> float:
        pairs = []
        for _ in range(times):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._ballast.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / times / 1e3


def captured(call: Call) -> Call:
    """Replay of the call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants everything initialised, on another stream
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _peak_memory(case: Case, seed: int) -> dict[str, float]:
    """MiB of each variant beyond the inputs, the gradients included."""
    inputs = case.inputs(seed, "cuda")
    peaks = {}
    for name, alignment in alignments(case).items():
        call = partial(step, alignment, *inputs)
        call()  # whatever libraries allocate once and keep
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peaks[f"{name} (MiB)"] = (torch.cuda.max_memory_allocated() - before) / (1 << 20)
    return peaks


def rates(
    case: Case,
    median_ms: Mapping[str, float],
    peak_gbs: float | None,
    peak_tflops: float | None,
) -> dict[str, float]:
    """What the operator achieves, also in percent of the peaks that are given."""
    seconds = median_ms["pcka"] / 1e3
    gbs = (2 * case.student_bytes + case.gradient_bytes) / seconds / 1e9
    tflops = Products.flops_of(case) / seconds / 1e12
    result = {"GB/s": gbs, "TFLOP/s": tflops}
    if peak_gbs is not None:
        result["% of peak GB/s"] = 100 * gbs / peak_gbs
    if peak_tflops is not None:
        result["% of peak TFLOP/s"] = 100 * tflops / peak_tflops
    return result


if __name__ == "__main__":
    main()
