"""Progress and speed: a bar on a terminal, elsewhere a line every half minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pcka.distributed import rank

T = TypeVar("T")
logger = logging.getLogger("pcka")

SECONDS = 30.0  # between two lines


class Progress(tqdm):
    """A tqdm bar over images, in the first process; log lines if there is no terminal."""

    def __init__(self, desc: str, total: int, **keywords: Any) -> None:
        disable = True if rank() else None  # None: disabled unless on a terminal
        super().__init__(
            desc=desc, total=total, unit="img", leave=False, disable=disable, **keywords
        )
        self._what = desc
        self._done = 0
        self._told = time.monotonic()

    def update(self, n: float | None = 1) -> bool | None:
        """Count ``n`` more images."""
        self._done += int(n or 0)
        now = time.monotonic()
        if self.disable and rank() == 0 and now - self._told >= SECONDS:
            logger.info("%s: %d of %d images", self._what, self._done, self.total)
            self._told = now
        return super().update(n)


class Pace:
    """Times an epoch on the host and shows a bar; a context manager.

    The first step is a warm-up and does not count towards the rate.
    """

    def __init__(self, desc: str, steps: int, batch_size: int) -> None:
        self._start = self._warm = time.perf_counter()
        self._steps = 0
        self._waiting = 0.0
        self._batch_size = batch_size
        self._bar = Progress(desc, steps * batch_size, unit_scale=True)

    def __enter__(self) -> Pace:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches; the time spent waiting for them counts as data time."""
        asked = time.perf_counter()
        for batch in batches:
            self._waiting += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def count_step(self) -> None:
        """Count a completed step."""
        if self._steps == 0:
            self._warm = time.perf_counter()
        self._steps += 1
        self._bar.update(self._batch_size)

    def show(self, **figures: float) -> None:
        """Show figures next to the bar."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})

    def figures(self, students: int = 1) -> dict[str, float]:
        """Seconds of the epoch, images per second, share of data time, students side by side."""
        end = time.perf_counter()
        timed = max(self._steps - 1, 1) * self._batch_size
        return {
            "seconds": end - self._start,
            "images_per_second": timed / (end - (self._warm if self._steps > 1 else self._start)),
            "data_share": self._waiting / (end - self._start),
            "students": students,
        }


@contextmanager
def console_log() -> Iterator[None]:
    """Print log lines, above the progress bar if there is one."""
    handler = logging.StreamHandler()
    handler.setFormatter(_RunFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    with logging_redirect_tqdm():
        yield


class _RunFormatter(logging.Formatter):
    """Appends the folder of the run that a line concerns: several may be trained side by side."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        run = getattr(record, "run", None)
        return line if run is None else f"{line}  ({run.directory})"
