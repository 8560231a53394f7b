"""VID: keep the information that features share (Ahn et al., CVPR 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcka.losses.adapters import ModulesByTap, adapt, fit_maps, pointwise, prepared
from pcka.losses.base import NO_CONTEXT, Context, Outputs, StagewiseLoss
from pcka.losses.checks import as_maps, as_samples, check_channels
from pcka.losses.numerics import at_one_size


def vid_loss(student: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    r"""Negative log-likelihood of the teacher's map under a Gaussian, without its constant.

    ``mean(1/2 ((X_t - mu)^2 / sigma^2 + log sigma^2))``, ``mu`` predicted from the student and
    ``sigma^2`` one for each channel (Ahn et al. 2019, section 2; a mean in place of the sum, as in
    the authors' public code).

    Args:
        student: ``mu (B, C, H, W)``, any floating dtype.
        teacher: same shape and device; no gradient reaches it.
        variance: ``sigma^2 (C,)``, positive.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: maps that differ in shape or device, or a variance that is not one per channel.
    """
    student, teacher = as_maps(student, teacher)
    check_channels(student, variance=variance)
    variance = variance.to(student.dtype)[:, None, None]
    square = (teacher - student).square()
    return (square / variance + variance.log()).mean() / 2


class Predictor(nn.Module):
    """A Gaussian of the teacher's map, given the student's: mean and variance are trained.

    Three 1x1 convolutions without bias, with ReLU between them, predict the mean;
    ``softplus(a_c) + eps`` is the variance of each channel at all positions (Ahn et al. 2019,
    section 2, and the authors' public code).

    Args:
        c_s: channels of the student.
        c_t: channels of the teacher, and of the hidden layers.
        variance: initial variance, above ``epsilon``.
        epsilon: lower bound of the variance.
    """

    def __init__(self, c_s: int, c_t: int, *, variance: float, epsilon: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            *pointwise(c_s, c_t, bias=False, relu=True),
            *pointwise(c_t, c_t, bias=False, relu=True),
            *pointwise(c_t, c_t, bias=False),
        )
        softplus = variance - epsilon
        raw = softplus + math.log(-math.expm1(-softplus))  # expm1(softplus) would overflow
        self.raw_variance = nn.Parameter(torch.full((c_t,), raw))
        self.epsilon = epsilon

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """:func:`vid_loss` of two maps, the larger one pooled to the size of the smaller."""
        student, teacher = at_one_size(student, teacher)
        variance = F.softplus(self.raw_variance) + self.epsilon
        return vid_loss(adapt(self.mean, student), teacher, variance)


class VID(StagewiseLoss):
    """:func:`vid_loss` for several stages: ``{"loss_vid_<stage>"}``.

    A :class:`Predictor` for each stage, made by :meth:`prepare`, is trained with the student.

    Args:
        stages: names of the tapped feature maps.
        weights: factor of each stage's term, or a single one for all.
        variance: initial variance, above ``epsilon``.
        epsilon: lower bound of the variance.
    """

    can_be_negative = True  # the logarithm of a variance below 1

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("stage1", "stage2", "stage3"),
        weights: float | Sequence[float] = (1.0, 1.0, 1.0),
        variance: float = 5.0,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__(stages, weights)
        if not math.inf > variance > epsilon > 0:
            raise ValueError(
                "variance must be finite and above epsilon, and both positive; got "
                f"{variance} and {epsilon}"
            )
        self.variance = variance
        self.epsilon = epsilon
        self.predictors = ModulesByTap()

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the predictor of each stage."""
        teacher = self.need(teacher, "teacher")
        make = partial(Predictor, variance=self.variance, epsilon=self.epsilon)
        self.predictors = fit_maps(make, student, teacher, self.taps)

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        """:func:`vid_loss` of the predicted map."""
        predictor = prepared(self.predictors, "VID")[stage]
        return predictor(*as_samples(student, teacher, widen=False))
