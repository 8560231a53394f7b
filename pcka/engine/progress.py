"""How far a work is: a bar on a terminal, and elsewhere a line in the log once a minute."""

from __future__ import annotations

import logging
import time
from typing import Any

from tqdm import tqdm

from pcka.distributed import rank

logger = logging.getLogger("classification")

SECONDS = 60.0  # between two lines


class Progress(tqdm):
    """tqdm's bar, in the first process, gone once it is full; lines where there is no terminal.

    Args:
        desc: what is done.
        total: number of images.
        keywords: of tqdm.
    """

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
