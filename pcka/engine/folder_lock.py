"""One process at a time in a run's folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_held: dict[int, tuple[int, int]] = {}  # handle -> device and inode of the folder


class FolderInUseError(ValueError):
    """Another process is using the folder; the message names the folder and what to do."""


def lock_folder(directory: str | Path) -> int:
    """Lock a folder until the returned file descriptor is closed or the process ends.

    Processes that this one forks (the workers of a ``DataLoader``) do not hold the lock: one that
    outlives a killed training run does not block the folder.

    Raises:
        FolderInUseError: another process, or another descriptor of this one, holds the lock.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise FolderInUseError(
            f"OUTPUT_DIR: another process is using {str(directory)!r}; wait for it to end, or "
            "choose another folder"
        ) from error
    _held[handle] = _identity(handle)
    return handle


def _identity(handle: int) -> tuple[int, int]:
    about = os.fstat(handle)
    return about.st_dev, about.st_ino


def _leave_to_the_parent() -> None:
    """Close inherited descriptors, unless their number has been reused in the meantime."""
    for handle, folder in _held.items():
        try:
            if _identity(handle) == folder:
                os.close(handle)
        except OSError:
            continue
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)
