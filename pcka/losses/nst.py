"""NST: match the distribution of neuron selectivity (Huang and Wang, 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import StagewiseLoss
from pcka.losses.checks import as_samples
from pcka.losses.numerics import at_one_size, without_autocast


@without_autocast
def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared maximum mean discrepancy of the channels, with a polynomial kernel.

    ``mean k(t, t) + mean k(s, s) - 2 mean k(s, t)`` with ``k(a, b) = <a, b>^2`` of the channels of
    a sample, flattened over positions and L2-normalised (Huang and Wang 2017, equations 6 and 8).
    The larger map is pooled (adaptive average) to the size of the smaller one.

    Args:
        student: ``(B, C_s, H_s, W_s)``, any floating dtype.
        teacher: ``(B, C_t, H_t, W_t)``, same device; no gradient reaches it.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: features that are not maps, or differ in batch size.
    """
    maps = at_one_size(*as_samples(student, teacher))
    s, t = (F.normalize(x.flatten(2), dim=2) for x in maps)
    return _mean_kernel(t, t) + _mean_kernel(s, s) - 2 * _mean_kernel(s, t)


def _mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b.transpose(1, 2)).square().mean()


class NST(StagewiseLoss):
    """:func:`nst_loss` for several stages: ``{"loss_nst_<stage>"}``.

    Args:
        stages: names of the tapped features.
        weights: factor of each stage's term, or a single one for all.
    """

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("stage1", "stage2", "stage3"),
        weights: float | Sequence[float] = (50.0, 50.0, 50.0),
    ) -> None:
        super().__init__(stages, weights)

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        return nst_loss(student, teacher)
