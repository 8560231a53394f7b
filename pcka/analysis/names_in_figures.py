"""Names of classes, layers and models in figures."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from pcka.extras import optional_package

P = ParamSpec("P")
R = TypeVar("R")


def names_as_they_are(draw: Callable[P, R]) -> Callable[P, R]:
    """Let a function draw texts literally: a pair of ``$`` in a name begins no formula."""

    @wraps(draw)
    def literally(*positional: P.args, **keywords: P.kwargs) -> R:
        matplotlib = optional_package("matplotlib", "train")
        with matplotlib.rc_context({"text.parse_math": False}):
            return draw(*positional, **keywords)

    return literally
