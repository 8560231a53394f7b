"""SP: keep the similarities between samples (Tung and Mori, ICCV 2019)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcka.losses.base import StagewiseLoss
from pcka.losses.checks import as_samples
from pcka.losses.numerics import leave_out_constant, unit_length, without_autocast


@without_autocast
def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""``||G_t - G_s||_F^2 / B^2``, ``G`` the row-normalised Gram matrix of a batch.

    ``G = X X^T`` of the flattened features ``X (B, D)``, each row divided by its L2 norm (Tung and
    Mori 2019, equations 1 to 4).

    Args:
        student: ``(B, ...)``, any floating dtype.
        teacher: ``(B, ...)`` of the same samples, on the same device; no gradient reaches it.

    Returns:
        A scalar: float32, or float64 for float64 input; 0 with gradient 0 for a single sample.

    Raises:
        ValueError: features of different batch sizes.
    """
    student, teacher = as_samples(student, teacher)
    difference = _similarities(teacher) - _similarities(student)
    loss = difference.square().sum() / student.shape[0] ** 2
    return leave_out_constant(loss, samples=student.shape[0], up_to=1, level="sp_loss")


def _similarities(x: Tensor) -> Tensor:
    rows = x.flatten(1)
    return unit_length(rows @ rows.T, dim=1)


class SP(StagewiseLoss):
    """:func:`sp_loss` for several stages: ``{"loss_sp_<stage>"}``.

    Args:
        stages: names of the tapped features.
        weights: factor of each stage's term, or a single one for all.
    """

    relational = True

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("last",),
        weights: float | Sequence[float] = (3000.0,),
    ) -> None:
        super().__init__(stages, weights)

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        return sp_loss(student, teacher)
