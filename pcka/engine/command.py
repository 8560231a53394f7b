"""How a command ends: user errors are reported in one line, without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from pcka.engine.config import ConfigError
from pcka.engine.folder_lock import FolderInUseError
from pcka.engine.launch import is_first
from pcka.files import CheckpointError

DEBUG = "--debug"


class TrainingFailedError(RuntimeError):
    """Training cannot continue, or failed in another process; the message says where and why."""


TOLD: tuple[type[Exception], ...] = (
    ConfigError,
    CheckpointError,
    FolderInUseError,
    TrainingFailedError,
    torch.OutOfMemoryError,
)


def run_command(main: Callable[[], object], *, interrupted: str = "") -> NoReturn:
    """Run a command and exit: status 0, 1 after an error, or 130 after Ctrl-C, as in shells.

    An ``OSError`` that concerns a file and an ``ImportError`` that says what to install are
    reported in one line too. With ``--debug``, errors keep their traceback. A process started by
    ``torchrun`` records its error where ``torchrun`` looks for it.

    Args:
        main: the command.
        interrupted: how to resume interrupted work.
    """
    try:
        _recorded(main)()
    except KeyboardInterrupt:
        if is_first():
            print("\ninterrupted" + (f": {interrupted}" if interrupted else ""), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _is_told(error) or DEBUG in sys.argv:
            raise
        print(f"error: {' '.join(f'{error}{_advice(error)}'.split())}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _advice(error: Exception) -> str:
    if not isinstance(error, torch.OutOfMemoryError):
        return ""
    return " What may help: a smaller batch or image, or fewer models side by side"


def _recorded(main: Callable[[], object]) -> Callable[[], object]:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(main)


def _is_told(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.filename is not None
    if isinstance(error, ImportError):
        return "pip install" in str(error)
    return isinstance(error, TOLD)
