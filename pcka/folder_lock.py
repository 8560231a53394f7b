"""One process at a time in a run's folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FolderInUseError(ValueError):
    """Another process works in the folder; the message names it and the way out."""


def lock_folder(directory: str | Path) -> int:
    """Return an open handle of a folder that is locked until it is closed or the process ends.

    Raises:
        FolderInUseError: another process, or another handle of this one, holds the lock.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise FolderInUseError(
            f"OUTPUT_DIR: another process is at work in {str(directory)!r}; wait for it to end, or "
            "choose another folder"
        ) from error
    return handle
