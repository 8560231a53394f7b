"""Loss modules by name, for configuration files."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from pcka.losses.base import Loss

L = TypeVar("L", bound=type[Loss])


_LOSSES: dict[str, type[Loss]] = {}


def register(name: str) -> Callable[[L], L]:
    """Class decorator: make a loss module available to :func:`build` under ``name``.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(loss: L) -> L:
        if name in _LOSSES:
            raise ValueError(f"name: a loss {name!r} is registered already; choose another name")
        _LOSSES[name] = loss
        return loss

    return decorate


def build(name: str, **kwargs: object) -> Loss:
    """Build the loss module registered under ``name`` with the keywords of its ``__init__``.

    Raises:
        ValueError: an unknown name or keyword; the message lists the known ones.
    """
    loss = _find(name)
    accepted = defaults(name)
    for keyword in kwargs:
        if keyword not in accepted:
            raise ValueError(f"{name} takes no {keyword!r}; it takes {', '.join(accepted)}")
    return loss(**kwargs)


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_LOSSES)


def defaults(name: str) -> dict[str, object]:
    """Keyword -> default of the loss registered under ``name``.

    Raises:
        ValueError: an unknown name.
    """
    parameters = inspect.signature(_find(name)).parameters
    return {keyword: parameter.default for keyword, parameter in parameters.items()}


def _find(name: str) -> type[Loss]:
    if name not in _LOSSES:
        raise ValueError(f"name: no loss {name!r}; there are {', '.join(names())}")
    return _LOSSES[name]
