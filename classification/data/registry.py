"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fvcore.common.config import CfgNode

from classification.data.image_set import Source
from pcka.engine.config import ConfigError, near_names

MakeSource = Callable[[CfgNode, str], Source]
F = TypeVar("F", bound=MakeSource)

_SOURCES: dict[str, MakeSource] = {}


def register(name: str) -> Callable[[F], F]:
    """Decorator: make a data set available as ``DATA.NAME``.

    What it decorates takes the section ``DATA`` and a split, "train" or "test", and gives the
    :class:`classification.data.Source` of that split.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(make: F) -> F:
        if name in _SOURCES:
            raise ValueError(f"name: a data set {name!r} is registered already; choose another")
        _SOURCES[name] = make
        return make

    return decorate


def dataset_names() -> list[str]:
    """The names that ``DATA.NAME`` may have, sorted."""
    return sorted(_SOURCES)


def make_source(data: CfgNode, split: str) -> Source:
    """Return the "train" or "test" part of the data set ``DATA.NAME``.

    Raises:
        ConfigError: an unknown name (near ones are named), or what the data set refuses.
    """
    if data.NAME not in _SOURCES:
        raise ConfigError(
            f"DATA.NAME: no data set is called {data.NAME!r}; "
            f"{near_names(data.NAME, dataset_names())}"
        )
    return _SOURCES[data.NAME](data, split)
