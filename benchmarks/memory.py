"""Memory that forward + backward takes beyond its inputs, on a CPU.

Every variant and case runs in its own process, which warms up on a small case of the same kind.
Then ``/proc/self/clear_refs`` resets the high-water mark of resident memory (VmHWM). The peak is
the mark after the one measured call, minus the resident memory before it (VmRSS). Inputs are
excluded, the gradient that the call returns is included.

The C library's settings make resident memory follow live memory: every block of 64 KiB or more is a
separate mapping that is returned to the kernel when freed (a fixed MALLOC_MMAP_THRESHOLD_ also
stops the library from raising it), and one arena holds the rest. The matrix library's packing
buffers count only as far as they outgrow those of the warm-up. The kernel counts pages in batches:
treat a MiB as noise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.cases import Case, select
from benchmarks.harness import markdown
from benchmarks.variants import alignments, step
from pcka.analysis.memory import peak_growth

_ROOT = Path(__file__).resolve().parents[1]
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
    "MALLOC_MMAP_MAX_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 16),
    "MALLOC_ARENA_MAX": "1",
}
_VARIANTS = ("loop", "split loop", "eager", "strong eager", "pcka")
_MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table and write the files; return the records."""
    parser = report.parser("Peak extra memory of forward + backward, each in a fresh process.")
    report.add_cases(parser)
    options = parser.parse_args(arguments)
    cases = report.chosen_cases(parser, options)
    if not sys.platform.startswith("linux"):
        raise SystemExit("benchmarks.memory reads /proc/self/status: it runs on Linux only")
    environment = report.start("cpu", options)
    settings = {"quick": options.quick, "threads": options.threads, "seed": options.seed}
    records = []
    for case in cases:
        peaks = {
            name: in_fresh_process("memory", {"case": case.name, "variant": name, **settings})
            for name in alignments(case)
        }
        sizes = {"student_bytes": case.student_bytes, "gradient_bytes": case.gradient_bytes}
        records.append({"case": case.describe(), **sizes, "peak_bytes": peaks})
    print(memory_table(records))
    report.write(options.output, "memory", {**environment, "malloc": _MALLOC}, records)
    if options.output is not None:
        _plot(options.output / "memory.png", records)
    return records


def in_fresh_process(script: str, task: Mapping[str, Any]) -> int:
    """Return the bytes that ``benchmarks.<script>.measure`` prints for a task, in a new process."""
    call = f"from benchmarks import {script}; {script}.measure({json.dumps(task)!r})"
    path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", call],
        env={**os.environ, **_MALLOC, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    if result.returncode != 0:
        raise SystemExit(f"{task}: the measuring process exited with {result.returncode}")
    return int(result.stdout)


def measure(task: str) -> None:
    """Print the peak growth in bytes. Runs in a separate process; ``task`` is JSON."""
    settings = json.loads(task)
    torch.set_num_threads(settings["threads"])
    (case,) = select([settings["case"]], quick=settings["quick"])
    name, seed = settings["variant"], settings["seed"]
    _warm_up(case.quick(), name, seed)
    print(peak_growth(partial(step, alignments(case)[name], *case.inputs(seed))))


def _warm_up(case: Case, name: str, seed: int) -> None:
    """Load the libraries, start their threads and touch the autograd engine."""
    torch.randn(256, 256).mm(torch.randn(256, 256)).exp_()
    step(alignments(case)[name], *case.inputs(seed))


def memory_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return MiB: student, gradients, and each variant's peak and its excess over the student."""
    rows = []
    for record in records:
        row = [record["case"]["name"]]
        row += [f"{record[key] / _MIB:.1f}" for key in ("student_bytes", "gradient_bytes")]
        for name in _VARIANTS:
            peak = record["peak_bytes"].get(name)
            excess = None if peak is None else peak - record["student_bytes"]
            row += ["" if size is None else f"{size / _MIB:.1f}" for size in (peak, excess)]
        rows.append(row)
    columns = [text for name in _VARIANTS for text in (f"{name} peak", f"{name} beyond student")]
    return markdown(["case (MiB)", "student", "gradients", *columns], rows)


def _plot(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    def relative(record: Mapping[str, Any], name: str) -> float | None:
        peak = record["peak_bytes"].get(name)
        return None if peak is None else peak / record["student_bytes"]

    labels = [record["case"]["name"] for record in records]
    series = {name: [relative(record, name) for record in records] for name in _VARIANTS}
    report.plot_points(path, labels, series, "peak extra memory / size of the student")


if __name__ == "__main__":
    main()
