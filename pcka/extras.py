"""Optional packages, and the extras that install them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def optional_package(name: str, extra: str = "export") -> Any:
    """Import a module, such as ``"safetensors.torch"``, from a package that an extra installs.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(_message([name.partition(".")[0]], extra)) from error


def require_packages(*names: str, extra: str) -> None:
    """Check that packages of an extra are installed, without importing them.

    Raises:
        ImportError: some are missing; the message names them and the extra.
    """
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ImportError(_message(missing, extra))


def _message(missing: Sequence[str], extra: str) -> str:
    return (
        f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; "
        f"run pip install 'pcka[{extra}]' (from a clone: pip install -e '.[{extra}]')"
    )


def names_as_they_are(draw: Callable[P, R]) -> Callable[P, R]:
    """Let a function draw texts literally: a pair of ``$`` in a name begins no formula."""

    @wraps(draw)
    def literally(*positional: P.args, **keywords: P.kwargs) -> R:
        matplotlib = optional_package("matplotlib", "train")
        with matplotlib.rc_context({"text.parse_math": False}):
            return draw(*positional, **keywords)

    return literally
