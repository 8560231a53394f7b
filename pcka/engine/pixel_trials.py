"""Whether a trained model would do better with differently preprocessed pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

POINTS = 2.0  # percentage points by which another input must be better
DEVIATIONS = 3.0  # standard deviations of the difference, likewise


class PixelInput(NamedTuple):
    """How pixels are preprocessed for a model.

    Attributes:
        mean: per channel, subtracted.
        std: per channel, divided by.
        swapped: whether red and blue are swapped first.
    """

    mean: list[float]
    std: list[float]
    swapped: bool = False


class Better(NamedTuple):
    """The result of :func:`better_input`.

    Attributes:
        ours: score with the input as it is, percent.
        reached: score with the best alternative, percent.
        name: of the best alternative, ``"statistics: …"`` or ``"channels: …"``.
        given: the best alternative; None if it is not clearly better.
    """

    ours: float
    reached: float
    name: str
    given: PixelInput | None


def better_input(
    own: PixelInput,
    usual: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    other_order: str,
    score: Callable[[PixelInput], Tensor],
) -> Better:
    """Try other statistics, and the channels in the other order.

    Better means by more than two percentage points, and by more than three standard deviations of
    the paired difference if neither were better (McNemar's).

    Args:
        own: the input as it is.
        usual: name -> means and standard deviations.
        other_order: name of the other channel order, such as ``"BGR"``.
        score: input -> how correct the model is on each sample, ``(N,)`` in [0, 1].
    """
    others = _others(own, usual, other_order)
    right = {name: score(given).double() for name, given in (("", own), *others.items())}
    best = max(others, key=lambda name: right[name].sum().item())
    reached, ours = (100 * right[name].mean().item() for name in (best, ""))
    change = right[best] - right[""]
    deviation = 100 * change.square().sum().item() ** 0.5 / len(change)
    better = reached - ours > max(POINTS, DEVIATIONS * deviation)
    return Better(ours, reached, best, others[best] if better else None)


def _others(
    own: PixelInput,
    usual: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    other_order: str,
) -> dict[str, PixelInput]:
    """The alternatives by name, without duplicates."""
    named = {
        f"statistics: {n}": PixelInput(list(mean), list(std)) for n, (mean, std) in usual.items()
    }
    named[f"channels: {other_order}"] = own._replace(swapped=True)
    named[f"channels: {other_order}, statistics reversed too"] = PixelInput(
        own.mean[::-1], own.std[::-1], True
    )
    found: dict[str, PixelInput] = {}
    for name, given in named.items():
        if given != own and given not in found.values():
            found[name] = given
    return found


def is_normal(mean: float, deviation: float) -> bool:
    """Whether normalised pixels are close to mean 0 and standard deviation 1."""
    return abs(mean) < 1.5 and 0.25 < deviation < 4


def numbers(values: Sequence[float]) -> str:
    """The values as written on the command line."""
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
