"""Losses, average precision and alignment of a detection run, as one picture."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PANELS = (
    ("Weighted loss terms", "loss", lambda key: "loss" in key and key != "total_loss"),
    ("COCO metrics", "AP (%)", lambda key: key.endswith(("bbox/AP", "bbox/AP50", "segm/AP"))),
    ("Teacher-student CKA of the levels", "CKA", lambda key: key.startswith("cka/")),
)


def plot_run(folder: str) -> None:
    """Draw ``curves.png`` from the run's ``metrics.json``; a panel without figures is left out.

    Args:
        folder: ``OUTPUT_DIR`` of the run.
    """
    entries = read_metrics(Path(folder, "metrics.json"))
    known = sorted({key for entry in entries for key in entry})
    panels = [(title, label, [k for k in known if wanted(k)]) for title, label, wanted in PANELS]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return
    figure = Figure(figsize=(5.0 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, label, keys) in zip(row, panels):
        for key in keys:
            points = [(entry["iteration"], entry[key]) for entry in entries if key in entry]
            axes.plot(*zip(*points), marker=".", markersize=4, label=key)
        axes.set(title=title, xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.savefig(Path(folder, "curves.png"), dpi=120)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The entries of a ``metrics.json`` by their steps; of steps that were trained twice the last.

    A run that was killed and resumed, or begun anew, writes steps again.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    entries: list[dict[str, float]] = []
    for entry in (json.loads(line) for line in lines if line.endswith("\n")):
        while entries and entries[-1]["iteration"] > entry["iteration"]:
            entries.pop()
        entries.append(entry)
    return entries
