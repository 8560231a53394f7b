"""ICKD-C: keep the correlations between channels (Liu et al., ICCV 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pcka.losses.adapters import ModulesByTap, adapt, fit_maps, pointwise, prepared
from pcka.losses.base import NO_CONTEXT, Context, Outputs, StagewiseLoss
from pcka.losses.checks import as_maps_of_one_width
from pcka.losses.numerics import unit_length, without_autocast


@without_autocast
def ickd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared differences of the correlations between channels, for each sample separately.

    ``sum((G_s - G_t)^2) / (B C)`` with ``G`` the inner products ``X X^T (C, C)`` of a sample's
    channels ``X (C, H*W)``, each row scaled to unit length (Liu et al. 2021, section 3.2; the
    scaling and the factor as in the authors' public code for CIFAR; the paper divides by ``C^2``).

    Args:
        student: ``(B, C, H_s, W_s)``, any floating dtype.
        teacher: ``(B, C, H_t, W_t)``, same device; no gradient reaches it.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: features that are not maps, or differ in batch size or channels.
    """
    student, teacher = as_maps_of_one_width(student, teacher)
    difference = _correlations(student) - _correlations(teacher)
    return difference.square().sum() / (student.shape[0] * student.shape[1])


def _correlations(x: Tensor) -> Tensor:
    """``(B, C, C)``, rows of unit length."""
    channels = x.flatten(2)
    return unit_length(torch.bmm(channels, channels.mT), dim=2)


class ICKD(StagewiseLoss):
    """:func:`ickd_loss` for several stages: ``{"loss_ickd_<stage>"}``.

    A trained 1x1 convolution with batch norm brings the student's map to the teacher's width.

    Args:
        stages: names of the tapped feature maps.
        weights: factor of each stage's term, or a single one for all.
    """

    def __init__(
        self, *, stages: Sequence[str] = ("last",), weights: float | Sequence[float] = (2.5,)
    ) -> None:
        super().__init__(stages, weights)
        self.adapters = ModulesByTap()

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the convolution of each stage."""
        teacher = self.need(teacher, "teacher")
        self.adapters = fit_maps(partial(pointwise, norm=True), student, teacher, self.taps)

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        return ickd_loss(adapt(prepared(self.adapters, "ICKD")[stage], student), teacher)
