"""Whether a trained model would be better with other pixels than it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

POINTS = 2.0  # percent, by which others must be better
DEVIATIONS = 3.0  # of the difference, likewise


class PixelInput(NamedTuple):
    """What is done to pixels before a model sees them.

    Attributes:
        mean: of each channel, subtracted.
        std: of each channel, divided by.
        swapped: red and blue change places first.
    """

    mean: list[float]
    std: list[float]
    swapped: bool = False


class Better(NamedTuple):
    """What :func:`better_input` found.

    Attributes:
        ours: percent, of the input as it is.
        reached: percent, of the best other one.
        name: of the best other one, ``"statistics: …"`` or ``"channels: …"``.
        given: the best other one; None where it is not clearly better.
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

    Better means by two points, and by three standard deviations of the difference on the same
    samples, were none of both better (McNemar's).

    Args:
        own: the input as it is.
        usual: name -> means and deviations.
        other_order: name of the other order, as ``"BGR"``.
        score: input -> how right the model is on each sample, ``(N,)`` from 0 to 1.
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
    """By name, each once."""
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
    """Whether normalised pixels are near mean 0 and deviation 1."""
    return abs(mean) < 1.5 and 0.25 < deviation < 4


def numbers(values: Sequence[float]) -> str:
    """As the command line takes them."""
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
