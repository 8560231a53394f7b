"""How the terms of a loss act on a model: the norm and direction of each term's gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

FAR = 1000.0


class TermGradient(NamedTuple):
    """The gradient of one term with respect to all parameters together.

    Attributes:
        share: its norm divided by the sum of all terms' norms, in [0, 1].
        cosine: with the gradient of the reference, in [-1, 1]; 0 if either is zero.
    """

    share: float
    cosine: float


def term_gradients(
    terms: Mapping[str, Tensor], parameters: Iterable[Tensor], reference: str
) -> dict[str, TermGradient]:
    r"""Measure ``g_i = d term_i / d parameters`` of each term.

    ``share_i = ||g_i|| / sum_j ||g_j||`` and ``cosine_i = <g_i, g_ref> / (||g_i|| ||g_ref||)``: a
    term with a small share changes little, and one with a negative cosine works against the
    reference (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, call it a
    conflict).

    Args:
        terms: name -> weighted scalar with a graph, which is kept for the backward pass.
        parameters: of the model, any shapes; those that do not require grad are skipped.
        reference: name of the term that the others are compared with, such as ``"loss_ce"``.

    Raises:
        ValueError: there is no such term.
    """
    if reference not in terms:
        raise ValueError(f"reference: no term {reference!r}; available: {', '.join(terms)}")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    of_reference = _gradient(terms[reference], trained)
    norms, products = {}, {}
    for name, term in terms.items():
        gradient = of_reference if name == reference else _gradient(term, trained)
        norms[name] = math.sqrt(_product(gradient, gradient))
        products[name] = _product(gradient, of_reference)
    total = sum(norms.values())
    return {
        name: TermGradient(
            share=_ratio(norm, total),
            cosine=_ratio(products[name], norm * norms[reference]),
        )
        for name, norm in norms.items()
    }


def _gradient(term: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    if not term.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    return list(torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True))


def _product(a: list[Tensor], b: list[Tensor]) -> float:
    return sum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))


def _ratio(value: float, by: float) -> float:
    return value / by if by != 0 else 0.0


def far_apart(metrics: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """Yield a warning if a term's gradient is at least :data:`FAR` times as long as another's.

    Args:
        metrics: records per epoch, some of which hold ``gradient_share_<term>``; the last of these
            counts.
    """
    prefix = "gradient_share_"
    measured = [record for record in metrics if any(key.startswith(prefix) for key in record)]
    if not measured:
        return
    last = measured[-1]
    shares = {key.removeprefix(prefix): v for key, v in last.items() if key.startswith(prefix)}
    (weak, least), (strong, most) = (f(shares.items(), key=itemgetter(1)) for f in (min, max))
    if most < FAR * least or not most:
        return
    apart = f"is {most / least:,.0f} times as long as" if least else "completely dominates"
    yield (
        f"the gradient of {strong} {apart} that of {weak} (epoch {last['epoch']:g}): the weaker "
        "term teaches next to nothing; change the weights in the DISTILL sections"
    )
