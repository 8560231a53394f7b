"""The metrics of a run: preserved across interruptions, read and plotted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter

from pcka.engine.curves import Panel, plot_panels

Points = list[tuple[int, float]]  # step, value

WINDOW = 20  # steps over which detectron2's writers take the median
EVALUATED = ("bbox/AP", "bbox/AP50", "segm/AP", "sem_seg/mIoU")


@dataclass
class MetricsState:
    """The last values of every logged metric, as part of the checkpoint.

    A checkpoint is saved before the metrics of its step are written, and losses are written as
    medians of their last values. A resumed run starts from the values in the checkpoint, and first
    writes those missing from the file.

    Args:
        path: the run's ``metrics.json``.
    """

    path: Path
    storage: EventStorage | None = field(default=None, init=False)
    _kept: dict[str, Any] = field(default_factory=dict, init=False)

    def state_dict(self) -> dict[str, Any]:
        """Metric -> whether its median is written, and its last values with their steps."""
        if self.storage is None:
            return self._kept
        smoothed = self.storage.smoothing_hints()
        return {
            name: [smoothed[name], [list(pair) for pair in history.values()[-WINDOW:]]]
            for name, history in self.storage.histories().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Store the values for :meth:`restore`."""
        self._kept = state

    def restore(self, storage: EventStorage) -> None:
        """Put the values into the run's storage; those in the file count as written."""
        self.storage = storage
        written = read_metrics(self.path) if self._kept else {}
        now = storage.iter
        for name, (smoothed, values) in self._kept.items():
            if values[-1][1] in dict(written.get(name, [])):
                storage.smoothing_hints()[name] = smoothed
                for pair in values:
                    storage.histories()[name].update(*pair)
                continue
            for value, step in values:
                storage.iter = step
                storage.put_scalar(name, value, smoothing_hint=smoothed)
        storage.iter = now


@dataclass(eq=False)
class RestoreMetrics(HookBase):
    """Restores a resumed run's metrics from its checkpoint, and writes the missing ones."""

    state: MetricsState
    writers: Sequence[EventWriter]

    def before_train(self) -> None:
        self.state.restore(self.trainer.storage)
        if self.trainer.storage.latest():
            for writer in self.writers:
                if not isinstance(writer, CommonMetricPrinter):  # it estimates the time left
                    writer.write()


def plot_run(folder: str) -> None:
    """Plot ``curves.png`` from the ``metrics.json`` in a run's folder, without empty panels."""
    plot_panels(run_panels(folder), Path(folder, "curves.png"), x="step")


def run_panels(folder: str) -> list[Panel]:
    """Return panels of losses, evaluations and per-level CKA by step; some may be empty."""
    curves = read_metrics(Path(folder, "metrics.json"))

    def chosen(wanted: Callable[[str], bool]) -> dict[str, Points]:
        return {key: curves[key] for key in sorted(curves) if wanted(key)}

    losses = chosen(lambda key: "loss" in key and key != "total_loss")
    alignments = chosen(lambda key: key.startswith("cka/"))
    return [
        Panel("Weighted loss terms", "loss", losses),
        Panel("Evaluations", "%", chosen(lambda key: key.endswith(EVALUATED))),
        Panel("Teacher\N{EN DASH}student CKA of the levels", "CKA", alignments, top=1.02),
    ]


def read_metrics(path: Path) -> dict[str, Points]:
    """Read the points of every metric in a ``metrics.json``; repeated steps keep the last value.

    Lines written together are not ordered by step, and a run that was resumed or restarted writes
    steps again: where a metric's steps go back, its earlier points from there on are replaced,
    separately for each metric. Values that could not be computed (NaN) are left out.
    """
    curves: dict[str, Points] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = dict(json.loads(line))
            step = int(entry.pop("iteration"))
        except (ValueError, TypeError, KeyError):
            continue  # an interruption cut the line and a resumed run appended to it, or it is bad
        for key, value in entry.items():
            points = curves.setdefault(key, [])
            while points and points[-1][0] >= step:
                points.pop()
            if math.isfinite(value):
                points.append((step, value))
    return {key: points for key, points in curves.items() if points}
