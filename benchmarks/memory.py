"""How much memory forward and backward take on top of the inputs, on a CPU.

``python -m benchmarks.memory [--cases P3 'cka-*'] [--output DIR]``

Every variant of every case runs in a process of its own. After a small step of the same kind has
loaded libraries and started threads, and after ``malloc_trim(0)`` has returned freed memory, the
high-water mark of resident memory is reset (5 into /proc/self/clear_refs). The figure is that mark
(VmHWM) after one step less the resident memory (VmRSS) before it: the inputs are not in it, the
student's gradient is. ``products`` counts rows, Grams and gradients of all groups at once.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, Case, select
from benchmarks.command_line import parser
from benchmarks.report import environment, heading, markdown_table, plot_bars, write
from benchmarks.variants import VARIANTS, alignments, products_step, training_step

MIB = 2**20
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_bytes(case: Case, variant: str, seed: int, threads: int) -> int:
    """Peak of extra resident memory of one step, in bytes; to be called in a fresh process."""
    torch.set_num_threads(threads)
    _step(case.tiny(), variant, seed)
    inputs = None if variant == "products" else case.inputs(seed)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    _CLEAR_REFS.write_text("5")
    _step(case, variant, seed, inputs)
    return _resident("VmHWM") - before


def _step(
    case: Case, variant: str, seed: int, inputs: tuple[torch.Tensor, torch.Tensor] | None = None
) -> None:
    if variant == "products":
        products_step(case)()
    else:
        training_step(alignments(case)[variant], *(inputs or case.inputs(seed)))()


def _resident(key: str) -> int:
    """Bytes of a line of /proc/self/status, which counts in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _in_fresh_process(*arguments: Any) -> int:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(peak_bytes, *arguments).result()


def measure_case(case: Case, given: argparse.Namespace) -> dict[str, Any]:
    """Return the peaks of all variants of a case, in MiB."""
    peaks = {
        name: _in_fresh_process(case, name, given.seed, given.threads) / MIB
        for name in VARIANTS
        if name in (*alignments(case), "products")
    }
    map_mib = case.input_bytes / MIB
    return {
        **case.as_json(),
        "map_mib": map_mib,
        "peak_mib": peaks,
        "excess_mib": {name: peak - map_mib for name, peak in peaks.items()},
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a row a case: size of the student's map, peaks, and what they exceed the map by."""
    header = [
        "case",
        "student (MiB)",
        *VARIANTS,
        *(f"{v} \N{MINUS SIGN} student" for v in VARIANTS),
    ]
    rows = [
        [
            result["name"],
            f"{result['map_mib']:.1f}",
            *(
                f"{result[kind][v]:.1f}" if v in result[kind] else ""
                for kind in ("peak_mib", "excess_mib")
                for v in VARIANTS
            ),
        ]
        for result in results
    ]
    return markdown_table(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen cases as the arguments say; 2 where this cannot be measured."""
    given = parser(__doc__).parse_args(arguments)
    if not _CLEAR_REFS.exists():
        print("benchmarks.memory needs Linux: there is no /proc/self/clear_refs", file=sys.stderr)
        return 2
    torch.set_num_threads(given.threads)
    cases = select(CASES, given.cases, tiny=given.quick)
    results = [measure_case(case, given) for case in cases]
    facts = environment(given.seed)
    print(heading(facts))
    print(
        "Peak memory of forward and backward, inputs excluded, the student's gradient included.\n"
    )
    print(table(results))
    if given.output is not None:
        write(given.output, "memory", {"environment": facts, "results": results})
        plot_bars(
            given.output / "memory.png",
            [case.name for case in cases],
            {v: [r["peak_mib"].get(v, float("nan")) for r in results] for v in VARIANTS},
            title="Peak memory of forward and backward, inputs excluded",
            unit="MiB",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
