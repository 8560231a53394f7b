"""How far a work is, and how fast: a bar on a terminal, elsewhere a line each half minute."""

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
    """tqdm's bar of images, in the first process; lines where there is no terminal."""

    def __init__(self, desc: str, total: int, **keywords: Any) -> None:
        disable = True if rank() else None  # None: unless there is a terminal
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
    """Times an epoch on the host, with a bar; a context manager.

    The first step, which warms up, does not count for the rate.
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
        """Yield the batches; what they take to come is time in data."""
        asked = time.perf_counter()
        for batch in batches:
            self._waiting += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def count_step(self) -> None:
        """A step was made."""
        if self._steps == 0:
            self._warm = time.perf_counter()
        self._steps += 1
        self._bar.update(self._batch_size)

    def show(self, **figures: float) -> None:
        """Show figures behind the bar."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})

    def figures(self, students: int = 1) -> dict[str, float]:
        """Seconds of the epoch, images a second, the share of time in data, students beside it."""
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
    """Print the log's lines, above a progress bar where there is one."""
    handler = logging.StreamHandler()
    handler.setFormatter(_RunFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    with logging_redirect_tqdm():
        yield


class _RunFormatter(logging.Formatter):
    """Names the folder of the run that a line concerns: several may be trained side by side."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        run = getattr(record, "run", None)
        return line if run is None else f"{line}  ({run.directory})"
