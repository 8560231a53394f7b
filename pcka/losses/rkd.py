"""RKD: keep distances and angles between samples (Park et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import StagewiseLoss
from pcka.losses.checks import as_samples, check_weights
from pcka.losses.numerics import leave_out_constant, without_autocast

LEAST_SQUARE = 1e-12


@without_autocast
def rkd_loss(
    student: Tensor, teacher: Tensor, *, distance_weight: float = 25, angle_weight: float = 50
) -> Tensor:
    r"""Smooth L1 differences of the pairwise distances and of the angles of all triplets.

    ``w_d * huber(d_s / mean d_s, d_t / mean d_t) + w_a * huber(a_s, a_t)``; the means are over
    positive distances, ``a_ijk = <e_ij, e_ik>`` with ``e_ij`` the normalised ``x_i - x_j`` (Park et
    al. 2019, equations 4 to 9).

    Args:
        student: ``(B, ...)``, flattened to ``(B, D)``, any floating dtype.
        teacher: ``(B, ...)`` of the same samples, on the same device; no gradient reaches it.
        distance_weight: ``w_d``, factor of the distances' part.
        angle_weight: ``w_a``, factor of the angles' part.

    Returns:
        A scalar: float32, or float64 for float64 input. Two samples have one distance, which is
        the mean, and no triplet: for fewer than three, it is 0 with gradient 0.

    Raises:
        ValueError: features of different batch sizes.
    """
    s, t = (x.flatten(1) for x in as_samples(student, teacher))
    distance = F.smooth_l1_loss(_distances(s), _distances(t))
    angle = F.smooth_l1_loss(_angles(s), _angles(t))
    loss = distance_weight * distance + angle_weight * angle
    return leave_out_constant(loss, samples=s.shape[0], up_to=2, level="rkd_loss")


def _distances(x: Tensor) -> Tensor:
    """``(B, B)``, divided by the mean of the positive ones."""
    squares = x.square().sum(1)
    distances = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=LEAST_SQUARE).sqrt()
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    distances = distances.masked_fill(itself, 0)
    # A single sample has no positive distance: it stays at 0 instead of becoming NaN.
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / mean.clamp(min=LEAST_SQUARE)


def _angles(x: Tensor) -> Tensor:
    """``(B, B, B)``: cosine at sample ``i`` between ``j`` and ``k``."""
    differences = F.normalize(x[None] - x[:, None], dim=2)
    return torch.bmm(differences, differences.transpose(1, 2))


class RKD(StagewiseLoss):
    """:func:`rkd_loss` for several stages: ``{"loss_rkd_<stage>"}``.

    Args:
        stages: names of the tapped features.
        weights: factor of each stage's term, or a single one for all.
        distance_weight, angle_weight: of :func:`rkd_loss`.
    """

    relational = True

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("pooled",),
        weights: float | Sequence[float] = (1.0,),
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
    ) -> None:
        super().__init__(stages, weights)
        check_weights(distance_weight=distance_weight, angle_weight=angle_weight)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        return rkd_loss(
            student,
            teacher,
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
        )
