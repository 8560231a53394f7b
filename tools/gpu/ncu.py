"""Nsight Compute's counters of every kernel of ours at P3 in bfloat16 and P2 in float32.

The clocks are left as they are. If ncu is missing or refuses the machine, that is noted.
"""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tools.gpu import output

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum": "bytes",
    "smsp__inst_executed.sum": "instructions",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active (%)",
    "launch__registers_per_thread": "registers",
}
CASES = ("p3_rows_bfloat16_2", "p2_rows_float32_2")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``ncu.csv`` and ``ncu.json``."""
    given = output.arguments(__doc__, arguments)
    driver = [sys.executable, "-m", "tools.gpu.one_step", given.device]
    driver += [*CASES, *(["--quick"] if given.quick else [])]
    program = output.watcher(given, "ncu", driver)
    log = given.output / "ncu.csv"
    command = [
        program, "--clock-control", "none", "--profile-from-start", "off",
        "--kernel-name-base", "demangled", "--kernel-name", "regex:pcka",
        "--metrics", ",".join(METRICS), "--csv", "--print-units", "base", "--log-file", str(log),
    ]  # fmt: skip
    code = subprocess.run(
        [*command, *driver], env={**os.environ, "OMP_NUM_THREADS": "4"}
    ).returncode
    kernels = read(log.read_text(errors="replace")) if log.exists() else []
    refused = [] if kernels else [f"ncu measured nothing and exited with {code}"]
    output.write(given.output, "ncu", {"kernels": kernels}, [*refused, *map(_line, kernels)])


def read(text: str) -> list[dict[str, Any]]:
    """One entry per launch, in order: ``kernel``, and the metrics by their short names."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        name = METRICS.get(row.get("Metric Name", ""))
        if name is None:
            continue
        launch = launches.setdefault(row["ID"], {"kernel": _short(row["Kernel Name"])})
        launch[name] = float(row["Metric Value"].replace(",", ""))
    return list(launches.values())


def _short(name: str) -> str:
    """The kernel's name and template arguments, without namespaces and parameters."""
    plain = name.replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    found = re.search(r"(\w+)(<.*?>)?\(", plain)
    return f"{found[1]}{found[2] or ''}" if found else name


def _line(launch: dict[str, Any]) -> str:
    return (
        f"{launch['kernel'][:60]}: {launch.get('ns', 0) / 1e3:.1f} us, "
        f"{launch.get('bytes', 0) / 1e6:.1f} MB, {launch.get('instructions', 0) / 1e6:.2f} M "
        f"instructions, {launch.get('warps active (%)', 0):.0f} % warps, "
        f"{launch.get('registers', 0):.0f} registers"
    )


if __name__ == "__main__":
    main()
