"""The figures of a run, over a kill: nothing is lost between the checkpoint and the writing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, EventWriter

from detection.curves import read_metrics

WINDOW = 20  # steps whose median detectron2's writers write


class MetricsState:
    """The last values of every logged figure, as a part of the checkpoint.

    A checkpoint is saved before its step's figures are written, and losses are written as medians
    of their last values. A resumed run starts from the values of the checkpoint, and first writes
    those that the file lacks.

    Args:
        path: ``metrics.json`` of the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storage: EventStorage | None = None
        self._kept: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Figure -> whether its median is written, and its last values with their steps."""
        if self.storage is None:
            return self._kept
        smoothed = self.storage.smoothing_hints()
        return {
            name: [smoothed[name], [list(pair) for pair in history.values()[-WINDOW:]]]
            for name, history in self.storage.histories().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the values for :meth:`restore`."""
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


class RestoreMetrics(HookBase):
    """Gives a resumed run the figures of its checkpoint, and writes what was not written.

    Args:
        state: of the checkpoint.
        writers: of the run.
    """

    def __init__(self, state: MetricsState, writers: Sequence[EventWriter]) -> None:
        self.state = state
        self.writers = writers

    def before_train(self) -> None:
        self.state.restore(self.trainer.storage)
        if self.trainer.storage.latest():
            for writer in self.writers:
                writer.write()
