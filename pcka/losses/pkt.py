"""PKT: match the probability that two samples are neighbours (Passalis and Tefas, ECCV 2018)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcka.losses.base import StagewiseLoss
from pcka.losses.checks import as_samples
from pcka.losses.numerics import leave_out_constant, without_autocast

EPSILON = 1e-7


@without_autocast
def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Divergence of the neighbour probabilities of a batch.

    ``mean over all entries of P_t log(P_t / P_s)`` (1e-7 added to both in the logarithm), ``P`` the
    cosine similarities ``(c + 1) / 2`` with rows scaled to sum 1 (Passalis and Tefas 2018,
    equations 3, 4 and 6).

    Args:
        student: ``(B, ...)``, flattened to ``(B, D)``, any floating dtype.
        teacher: ``(B, ...)`` of the same samples, on the same device; no gradient reaches it.

    Returns:
        A scalar: float32, or float64 for float64 input; 0 with gradient 0 for a single sample.

    Raises:
        ValueError: features of different batch sizes.
    """
    p_s, p_t = map(_probabilities, as_samples(student, teacher))
    loss = (p_t * ((p_t + EPSILON) / (p_s + EPSILON)).log()).mean()
    return leave_out_constant(loss, samples=p_s.shape[0], up_to=1, level="pkt_loss")


def _probabilities(x: Tensor) -> Tensor:
    rows = x.flatten(1)
    rows = rows / (rows.norm(dim=1, keepdim=True) + EPSILON)
    similarities = (rows @ rows.T + 1) / 2
    return similarities / similarities.sum(1, keepdim=True)


class PKT(StagewiseLoss):
    """:func:`pkt_loss` for several stages: ``{"loss_pkt_<stage>"}``.

    Args:
        stages: names of the tapped features.
        weights: factor of each stage's term, or a single one for all.
    """

    relational = True

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("pooled",),
        weights: float | Sequence[float] = (30000.0,),
    ) -> None:
        super().__init__(stages, weights)

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        return pkt_loss(student, teacher)
