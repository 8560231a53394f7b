"""How a command ends: what its user can mend is told in one line, without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from pcka.engine.config import ConfigError
from pcka.engine.folder_lock import FolderInUseError
from pcka.files import CheckpointError


class TrainingFailedError(RuntimeError):
    """A training cannot go on, or failed in another process; the message says where and why."""


TOLD: tuple[type[Exception], ...] = (
    ConfigError,
    CheckpointError,
    FolderInUseError,
    TrainingFailedError,
)


def run_command(
    main: Callable[[], object], *, interrupted: str = "", told: tuple[type[Exception], ...] = ()
) -> NoReturn:
    """Run a command to its exit status: 0, or 1 after an error, or 130 after Ctrl-C, as shells do.

    An ``OSError`` of a file and an ``ImportError`` that names what to install are told as well.

    Args:
        main: the command.
        interrupted: how to continue work that was interrupted.
        told: errors of the command's own whose message suffices, beside :data:`TOLD`.
    """
    try:
        main()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\ninterrupted" + (f": {interrupted}" if interrupted else ""), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _is_told(error, TOLD + told):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _is_told(error: Exception, told: tuple[type[Exception], ...]) -> bool:
    if isinstance(error, OSError) and not isinstance(error, told):
        return error.filename is not None
    if isinstance(error, ImportError):
        return "pip install" in str(error)
    return isinstance(error, told)
