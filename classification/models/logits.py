"""A hook for models that return more than their logits, so that they return only these."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pcka.taps import find_logits, part_names


class _PickLogits:
    """A forward hook that replaces a model's output with its logits; it can be copied."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, model: nn.Module, _: tuple[Any, ...], output: Any) -> Tensor:
        if isinstance(output, Tensor):
            return output
        logits = find_logits(output, self.key or None)
        if logits is None:
            raise ValueError(
                f"LOGITS: {type(model).__name__} returns {type(output).__name__} without a tensor "
                f"{self.key or 'logits'!r}; name the logits (available: {part_names(output)})"
            )
        return logits


def give_logits(model: nn.Module, key: str = "") -> nn.Module:
    """Make a model return its logits `(B, P)`, wherever they are in its output.

    Its modules, parameters and their names do not change.

    Args:
        model: images -> a tensor, or an output that :func:`pcka.taps.find_logits` can search.
        key: key of the logits; "" finds them automatically.

    Returns:
        The model. It raises a ``ValueError`` if its output contains no logits.
    """
    # The hook of a later call, with a key, runs first; the others then receive the logits.
    model.register_forward_hook(_PickLogits(key), prepend=True)
    return model
