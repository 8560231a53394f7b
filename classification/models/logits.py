"""Models that return more than their logits, made to return these."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pcka.taps import find_logits, part_names


class _PickLogits:
    """A hook that gives the logits in the place of what the model returns; it can be copied."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, model: nn.Module, _: tuple[Any, ...], output: Any) -> Tensor:
        if isinstance(output, Tensor):
            return output
        logits = find_logits(output, self.key or None)
        if logits is None:
            raise ValueError(
                f"LOGITS: {type(model).__name__} returns {type(output).__name__} without a tensor "
                f"{self.key or 'logits'!r}; name the logits (there are {part_names(output)})"
            )
        return logits


def give_logits(model: nn.Module, key: str = "") -> nn.Module:
    """Let a model return its logits `(B, P)`, wherever they are in what it returns.

    Its modules, parameters and their names stay as they are.

    Args:
        model: images -> a tensor, or what :func:`pcka.taps.find_logits` looks into.
        key: of the logits; "" finds them by themselves.

    Returns:
        The model. While it runs, an output without logits is a ``ValueError``.
    """
    # A key that is given later is looked for first; then the output is logits already.
    model.register_forward_hook(_PickLogits(key), prepend=True)
    return model
