"""Speed of the operators on a GPU, compared with eager and compiled PyTorch and the bare products.

Times forward and backward of the mean alignment with respect to the student, for the levels of an
800 x 1333 image with the patch sizes of the detection configurations. CUDA events time each variant
twice: launched by the host, gaps included, and replayed as a CUDA graph, which leaves only the
GPU's work. A call goes through several pairs of maps in turn, together larger than the cache. GB/s
count the minimum traffic (both maps read, the gradient written), TFLOP/s the operations of the bare
products; both are compared with the ceilings, which are measured first. Memory is the allocator's
peak beyond what was allocated before.

Finally, the profiler counts what ``pcka`` and ``eager`` launch, and times each kernel.

A variant that fails on a case (for example, out of memory) is reported, and the rest continues.
Exits with 2 if there is no GPU; ``--device cpu --quick`` checks that everything else runs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import ceilings, device, report
from benchmarks.baselines import Products
from benchmarks.cases import GPU_CASES, Case, dtype_name
from benchmarks.compiled import COMPILED, compiled_eager, compiled_names
from benchmarks.harness import Call, compare, timing_table
from benchmarks.variants import Alignment, alignments, step

VARIANTS = ("pcka", "eager", "strong eager")
CACHES = 4  # the maps of a call are at least this many times as large as the cache
MOST_PAIRS = 8  # small levels stay in the cache, as they do in a training step
SAMPLE_SECONDS = 0.01


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table and write the files; return the records."""
    parser = report.parser("Time the operators and their baselines on a GPU.")
    report.add_cases(parser)
    report.add_device(parser)
    parser.add_argument("--rounds", type=int, default=7, help="samples of each variant")
    parser.add_argument("--seconds", type=float, default=600, help="start no case after this time")
    options = parser.parse_args(arguments)
    cases = report.chosen_cases(parser, options, GPU_CASES)
    began = time.monotonic()
    environment = report.start(options.device, options)
    environment["ceilings"] = ceilings.measure(options.device, quick=options.quick)
    records: list[dict[str, Any]] = []
    for case in cases:
        if time.monotonic() - began > options.seconds:
            print(f"out of time: skipped {', '.join(c.name for c in cases[len(records) :])}")
            break
        records.append(record(case, options, environment["ceilings"]))
        print(timing_table(records[-1:]), flush=True)
        report.write(options.output, "operators_gpu", environment, records, summary(records))
    for case, entry in zip(cases, records):  # last: the profiler slows down all later launches
        if _is_profiled(case.name):
            entry["launches"] = _launches(case, options)
            report.write(options.output, "operators_gpu", environment, records, summary(records))
    print(timing_table(records))
    return records


def _is_profiled(name: str) -> bool:
    """Whether it is the rows of any level at batch 2, of P2 or P3 at 16, or the columns of P3."""
    return ("_rows_" in name and name.endswith("_2")) or name.startswith(
        ("p2_rows", "p3_rows", "p3_columns")
    )


class Rotating:
    """Steps on several pairs of maps in turn, so that no cache holds the next pair."""

    def __init__(self, alignment: Alignment, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.alignment, self.pairs = alignment, pairs

    def __call__(self) -> None:
        for student, teacher in self.pairs:
            step(self.alignment, student, teacher)


def record(case: Case, options: Any, peaks: Mapping[str, float]) -> dict[str, Any]:
    """Return the times of all variants of a case; ``failures``: variant -> why it has none."""
    on = options.device
    pairs = [case.inputs(options.seed + index, on) for index in range(_pairs(case, on))]
    failures: dict[str, str] = {}
    calls: dict[str, Call] = {}
    memory: dict[str, float] = {}
    compiled = case.name in compiled_names(quick=options.quick)
    for name, alignment in _alignments(case, on, compiled=compiled).items():
        call = Rotating(alignment, pairs)
        with _reported(name, failures):
            call()  # compiles, and chooses algorithms
            device.synchronize(on)
            calls[name] = call
            if on == "cuda":
                memory[f"{name} (MiB)"] = _peak_memory(partial(step, alignment, *pairs[0]))
        if on == "cuda" and name in calls:
            with _reported(f"{name} graph", failures):
                _check_room(memory[f"{name} (MiB)"])
                calls[f"{name} graph"] = device.captured(call)
    with _reported("products", failures):
        products = Products(case, case.dtype, on)
        calls["products"] = partial(_repeated, products, len(pairs))
    calls = {name: call for name, call in calls.items() if _runs(name, call, on, failures)}
    clock = device.timer(on)
    timings = compare(
        calls,
        rounds=2 if options.quick else options.rounds,
        loop_rounds=1,
        sample_seconds=0.0 if options.quick else SAMPLE_SECONDS / len(pairs),
        timer=lambda call, times: clock(call, times) / len(pairs),
    )
    best = min(timings["median_ms"].get(name, float("inf")) for name in ("pcka", "pcka graph"))
    figures = {**rates(case, best, peaks), **memory}
    calls.clear()
    torch._dynamo.reset()
    _empty_cache()
    return {"case": case.describe(), **timings, "figures": figures, "failures": failures}


def _repeated(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def _alignments(case: Case, on: str, *, compiled: bool) -> dict[str, Alignment]:
    found = alignments(case)
    chosen: dict[str, Alignment] = {name: found[name] for name in VARIANTS if name in found}
    return chosen | ({COMPILED: compiled_eager(case, on)} if compiled else {})


def _pairs(case: Case, on: str) -> int:
    """Return the number of pairs of maps that a call goes through."""
    if on != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MOST_PAIRS, -(-CACHES * cache // (2 * case.student_bytes))))


@contextmanager
def _reported(name: str, failures: dict[str, str]) -> Iterator[None]:
    """Record the first line of an exception instead of raising it, and free the memory."""
    try:
        yield
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        failures[name] = f"{type(error).__name__}: {line[:200]}"
        print(f"{name}: {failures[name]}", flush=True)
        error.__traceback__ = None  # its frames hold tensors
        _empty_cache()


def _runs(name: str, call: Call, on: str, failures: dict[str, str]) -> bool:
    """Whether the call still works with the memory that the others hold."""
    with _reported(name, failures):
        call()
        device.synchronize(on)
        return True
    return False


def _empty_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_room(needed: float) -> None:
    """Refuse a capture that would run out of memory, which leaves the allocator unusable."""
    _empty_cache()
    free = torch.cuda.mem_get_info()[0] / (1 << 20)
    if 1.5 * needed > free:
        raise MemoryError(f"a graph needs {needed:.0f} MiB; {free:.0f} MiB of memory is free")


def _peak_memory(call: Call) -> float:
    """Return the peak MiB beyond the inputs, the gradient included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / (1 << 20)


def rates(case: Case, milliseconds: float, peaks: Mapping[str, float]) -> dict[str, float]:
    """Return the rates that the operator achieves, also in percent of the measured ceilings."""
    gbs = (2 * case.student_bytes + case.gradient_bytes) / milliseconds / 1e6
    tflops = Products.flops_of(case) / milliseconds / 1e9
    return {
        "GB/s": gbs,
        "% of copy": 100 * gbs / peaks["copy GB/s"],
        "TFLOP/s": tflops,
        "% of product": 100 * tflops / peaks[f"{dtype_name(case.dtype)} TFLOP/s"],
    }


def _launches(case: Case, options: Any) -> dict[str, list[dict[str, Any]]]:
    """Return variant -> its kernels."""
    pair, found, failures = case.inputs(options.seed, options.device), {}, dict[str, str]()
    for name in VARIANTS[:2]:
        call: Callable[[], object] = partial(step, alignments(case)[name], *pair)
        with _reported(f"profile of {name}", failures):
            found[name] = device.launches(call, options.device)
    _empty_cache()
    return found


def summary(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line per case: milliseconds as launched, and as a graph."""
    lines = ["ms as launched / as a graph; last: launches of pcka, failures"]
    for entry in records:
        ms = entry["median_ms"]
        cells = [
            f"{name} {_ms(ms.get(name))}/{_ms(ms.get(f'{name} graph'))}"
            for name in (*VARIANTS, COMPILED)
            if name in ms
        ]
        kernels = entry.get("launches", {}).get("pcka", [])
        count = sum(kernel["count"] for kernel in kernels)
        lines.append(
            f"{entry['case']['name']}: {', '.join(cells)}, products {_ms(ms.get('products'))}"
            + (f"; {count:g}" if kernels else "")
            + (f"; failed: {', '.join(entry['failures'])}" if entry["failures"] else "")
        )
    return lines


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main()
