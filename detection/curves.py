"""Losses, average precision and alignment of a detection run, as one picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Points = list[tuple[int, float]]  # step, value

EVALUATED = ("bbox/AP", "bbox/AP50", "segm/AP", "sem_seg/mIoU")
PANELS = (
    ("Weighted loss terms", "loss", lambda key: "loss" in key and key != "total_loss"),
    ("Evaluations", "%", lambda key: key.endswith(EVALUATED)),
    ("Teacher-student CKA of the levels", "CKA", lambda key: key.startswith("cka/")),
)


def plot_run(folder: str) -> None:
    """Draw ``curves.png`` from the run's ``metrics.json``; a panel without figures is left out.

    Args:
        folder: ``OUTPUT_DIR`` of the run.
    """
    curves = read_metrics(Path(folder, "metrics.json"))
    panels = [(title, label, [k for k in curves if wanted(k)]) for title, label, wanted in PANELS]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return
    figure = Figure(figsize=(5.0 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    last = max(steps[-1][0] for steps in curves.values())
    for axes, (title, label, keys) in zip(row, panels):
        for key in sorted(keys):
            _draw(axes, key, curves[key])
        axes.set(title=title, xlabel="step", ylabel=label)
        axes.set_xlim(0, max(last, 1) * 1.02)  # the last point is drawn whole
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if label != "loss":  # some losses go below 0
            largest = max(value for key in keys for _, value in curves[key])
            axes.set_ylim(0, 1.05 * largest or 1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.savefig(Path(folder, "curves.png"), dpi=120)


def _draw(axes: Axes, key: str, points: Points) -> None:
    """A line; a single point is a line across, which can be read off and compared."""
    if len(points) > 1:
        axes.plot(*zip(*points), marker=".", markersize=4, label=key)
        return
    ((step, value),) = points
    (line,) = axes.plot(step, value, marker="o", clip_on=False, label=f"{key}: {value:.3g}")
    axes.axhline(value, color=line.get_color(), alpha=0.4, linestyle="--")


def read_metrics(path: Path) -> dict[str, Points]:
    """The points of every figure in a ``metrics.json``; of steps that were trained twice the last.

    The lines of one writing are in no order of their steps, and a run that was killed and resumed,
    or begun anew, writes steps again: each figure by itself begins anew where its steps go back.
    Figures that could not be computed (NaN) are left out.
    """
    curves: dict[str, Points] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = dict(json.loads(line))
            step = int(entry.pop("iteration"))
        except (ValueError, TypeError, KeyError):
            continue  # a kill tore the line, and a resumed run wrote on behind it, or it is damaged
        for key, value in entry.items():
            points = curves.setdefault(key, [])
            while points and points[-1][0] >= step:
                points.pop()
            if math.isfinite(value):
                points.append((step, value))
    return {key: points for key, points in curves.items() if points}
