"""The metrics of a finished run, by task and by class."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detection.settings import RESULT

PIXELS = "sem_seg"  # the semantic segmentation task; the others are detection tasks

Results = Mapping[str, Mapping[str, float | None]]  # task -> metric -> percent


def read_result(folder: Path) -> Results:
    """Return the final metrics of a run; see :func:`by_task`."""
    return by_task(json.loads((folder / RESULT).read_text()))


def by_task(results: Mapping[str, Any]) -> Results:
    """Return metrics by task; of several test sets, each has tasks such as ``"bbox (set)"``.

    Args:
        results: as :func:`detection.evaluation.evaluate` returns them.
    """
    found: dict[str, Mapping[str, float | None]] = {}
    for name, metrics in results.items():
        if all(isinstance(value, Mapping) for value in metrics.values()):  # name is a set's
            found |= {f"{task} ({name})": of_task for task, of_task in metrics.items()}
        else:
            found[name] = metrics
    return found


def class_figures(
    results: Mapping[str, Results],
) -> Iterator[tuple[str, list[str], dict[str, list[float | None]]]]:
    """Yield (task, classes, name -> metric of each class), for tasks with per-class metrics.

    The metric is :func:`class_metric`.
    """
    tasks = dict.fromkeys(task for of_one in results.values() for task in of_one)
    for task in tasks:
        measured = {name: of_one[task] for name, of_one in results.items() if task in of_one}
        prefix = f"{class_metric(task)}-"
        keys = dict.fromkeys(
            key for metrics in measured.values() for key in metrics if key.startswith(prefix)
        )
        if keys:
            classes = [key.removeprefix(prefix) for key in keys]
            yield task, classes, {
                name: [_known(metrics.get(key)) for key in keys]
                for name, metrics in measured.items()
            }  # fmt: skip


def class_metric(task: str) -> str:
    """Name of the per-class metric: AP of boxes and masks, IoU of pixels."""
    return "IoU" if task.startswith(PIXELS) else "AP"


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
