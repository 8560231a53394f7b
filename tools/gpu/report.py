"""Tables of a run: ``python -m tools.gpu.report RESULTS.json`` prints Markdown.

The results of ``tools/gpu_check.py`` record what they were made with: card, driver, versions,
commit and command.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Results = Mapping[str, Any]
VARIANTS = ("pcka", "eager", "strong eager", "compiled eager", "products")


def markdown(results: Results) -> str:
    """All tables of the stages that have something to report."""
    parts = ["# GPU check", _made_with(results), _stages(results)]
    for name, stage in results["stages"].items():
        texts = {title: part(results) for title, part in TABLES.get(name, {}).items()}
        if name not in TABLES:
            texts = {name.capitalize(): "\n".join(f"- {line}" for line in said(stage))}
        parts += [f"## {title}\n\n{text}" for title, text in texts.items() if text]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column left-aligned."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, marks, *rows))


def _written(results: Results, stage: str, name: str) -> Mapping[str, Any]:
    """What a stage wrote under a name; empty if nothing."""
    found = results["stages"].get(stage, {}).get("written", {}).get(name, {})
    return found if isinstance(found, Mapping) else {}


def _made_with(results: Results) -> str:
    found = _written(results, "environment", "environment")
    info, versions = found.get("build_info", {}), found.get("versions", {})
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    lines = {
        "card, driver, memory, clocks, power limit": found.get("card"),
        "operators": f"torch {info.get('torch_version')}, CUDA {info.get('cuda_version')}, "
        + " ".join(info.get("cuda_archs") or []),
        "software": f"Python {found.get('python')}, {shown}",
        "cores": found.get("cores"),
        "commit": found.get("commit") or results.get("bundle", {}).get("commit"),
        "command": f"`{results['command']}`",
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _stages(results: Results) -> str:
    rows = [
        [name, stage["status"], f"{stage['seconds']:.0f}", str(stage["limit"])]
        for name, stage in results["stages"].items()
    ]
    return table(["stage", "status", "s", "limit"], rows)


def said(stage: Mapping[str, Any]) -> list[str]:
    """A stage's lines for the summary."""
    written = [content for content in stage["written"].values() if isinstance(content, Mapping)]
    return [line for content in written for line in content.get("summary", [])]


def _operators(results: Results) -> str:
    """Milliseconds as launched / as a graph, throughput, memory and launches."""
    rows = []
    for entry in _written(results, "operators", "operators_gpu").get("records", []):
        ms, figures = entry["median_ms"], entry["figures"]
        cells = []
        for name in VARIANTS:
            times = [ms.get(name), ms.get(f"{name} graph")]
            cells.append(" / ".join(f"{t:.3g}" for t in times if t is not None) or "-")
        speed = [f"{figures[n]:.0f}" for n in ("GB/s", "% of copy")]
        memory = [figures.get(f"{name} (MiB)") for name in VARIANTS[:2]]
        cells += [*speed, *("-" if size is None else f"{size:.0f}" for size in memory)]
        kernels = entry.get("launches", {})
        cells += [_launched(kernels.get(name)) for name in VARIANTS[:2]]
        rows.append([entry["case"]["name"], *cells])
    header = [*(f"{name} (ms)" for name in VARIANTS), "GB/s", "% of copy"]
    header += ["pcka (MiB)", "eager (MiB)", "launches", "of eager"]
    return table(["case", *header], rows) if rows else ""


def _launched(kernels: Sequence[Mapping[str, Any]] | None) -> str:
    return "-" if not kernels else f"{sum(kernel['count'] for kernel in kernels):g}"


def _kernels(results: Results) -> str:
    """Microseconds of every kernel of the operator, by case."""
    parts = []
    for entry in _written(results, "operators", "operators_gpu").get("records", []):
        kernels = entry.get("launches", {}).get("pcka", [])
        rows = [
            [kernel["kernel"][:90].replace("|", "\\|"), f"{kernel['count']:g}",
             f"{kernel['microseconds']:.1f}"]
            for kernel in kernels
        ]  # fmt: skip
        if rows and entry["case"]["name"].startswith(("p2_rows", "p3_rows")):
            parts.append(f"{entry['case']['name']}\n\n" + table(["kernel", "launches", "us"], rows))
    return "\n\n".join(parts)


def _counters(results: Results) -> str:
    launches = _written(results, "ncu", "ncu").get("kernels", [])
    if not launches:
        return ""
    names = [name for name in launches[0] if name != "kernel"]
    rows = [
        [launch["kernel"][:90].replace("|", "\\|"), *(f"{launch.get(n, 0):.4g}" for n in names)]
        for launch in launches
    ]
    return table(["kernel", *names], rows)


def _detector(results: Results) -> str:
    rows = []
    for entry in _written(results, "detector", "detection_step").get("records", []):
        medians = {name: statistics.median(step["ms"]) for name, step in entry["steps"].items()}
        bound = medians["student step"] + medians["teacher forward"]
        for name, step in entry["steps"].items():
            peak = step["peak_bytes"]
            rows.append(
                [
                    f"{entry['size']}, batch {entry['batch']}: {name}",
                    f"{medians[name]:.1f}",
                    f"{medians[name] / bound:.3f}",
                    "-" if peak is None else f"{peak / (1 << 20):.0f}",
                ]
            )
    header = ["RetinaNet R101 -> R50", "ms", "/ (student step + teacher forward)", "peak (MiB)"]
    return table(header, rows) if rows else ""


# For stages whose summary does not say it all: stage -> title -> part.
TABLES: dict[str, dict[str, Callable[[Results], str]]] = {
    "environment": {},  # shown at the top
    "operators": {
        "Operators: milliseconds as launched / as a CUDA graph": _operators,
        "Kernels of one step": _kernels,
    },
    "ncu": {"Nsight Compute": _counters},
    "detector": {"Detector": _detector},
}


if __name__ == "__main__":
    sys.stdout.write(markdown(json.loads(Path(sys.argv[1]).read_text())))
