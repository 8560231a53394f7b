"""Model names and their constructors."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from torch import nn

_CONSTRUCTORS: dict[str, Callable[[int], nn.Module]] = {}


def register(name: str, constructor: Callable[[int], nn.Module]) -> None:
    """Make `constructor(num_classes)` available as `create_model(name, num_classes)`.

    The model it returns gives logits and has `stage_names`, the module paths whose outputs are
    the stage outputs after the activation, stem first; its pooled features are the output of the
    module `avgpool`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _CONSTRUCTORS:
        raise ValueError(f"name: expected a name not registered yet, got {name!r}")
    _CONSTRUCTORS[name] = constructor


def model_names() -> list[str]:
    """Return the names that `create_model` knows, sorted."""
    return sorted(_CONSTRUCTORS)


def create_model(name: str, num_classes: int) -> nn.Module:
    """Build a freshly initialised model by its community name.

    Args:
        name: one of `model_names()`; upper and lower case count.
        num_classes: number of logits.

    Returns:
        A module from images `(B, 3, H, W)` to logits `(B, num_classes)`, with `stage_names`.

    Raises:
        ValueError: unknown name (the message lists the nearest ones) or `num_classes` below 1.
    """
    if name not in _CONSTRUCTORS:
        by_folded = {known.casefold(): known for known in model_names()}
        near = [by_folded[match] for match in get_close_matches(name.casefold(), by_folded)]
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(model_names())}"
        raise ValueError(f"name: expected one of model_names(), got {name!r}; {hint}")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    return _CONSTRUCTORS[name](num_classes)
