"""How detection's commands end: what their user can mend is told in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from detection.checkpoint import WeightsError
from detection.config import ConfigError
from detection.data.mapper import UnusableImageError
from pcka.checkpoint import CheckpointError
from pcka.folder_lock import FolderInUseError


class TrainingFailedError(RuntimeError):
    """A training that another process ran and that failed; that process said why."""


TOLD = (
    ConfigError,
    WeightsError,
    CheckpointError,
    FolderInUseError,
    UnusableImageError,
    TrainingFailedError,
)


def run_command(main: Callable[[], object], *, interrupted: str = "") -> NoReturn:
    """Run a command to its exit status: 0, or 1 after an error, or 130 after Ctrl-C.

    Args:
        main: the command.
        interrupted: what goes on with a work that was broken off.
    """
    try:
        main()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\ninterrupted" + (f": {interrupted}" if interrupted else ""), file=sys.stderr)
        sys.exit(130)
    except TOLD as error:
        _fail(str(error))
    except FloatingPointError as error:  # detectron2's, of a loss that is not finite
        _fail(f"{error}; SOLVER.BASE_LR may be too high, or SOLVER.WARMUP_ITERS too few")
    except OSError as error:
        if error.filename is None:
            raise
        _fail(str(error))
    sys.exit(0)


def _fail(reason: str) -> NoReturn:
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(1)
