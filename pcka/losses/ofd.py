"""OFD: imitate what the teacher's activations let through (Heo et al., ICCV 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pcka.losses.adapters import ModulesByTap, adapt, fit, pointwise, prepared
from pcka.losses.base import NO_CONTEXT, Context, Outputs, StagewiseLoss
from pcka.losses.checks import as_maps, as_samples, as_stages, check_channels, check_weights
from pcka.losses.numerics import at_one_size

RARELY = 1e-3
"""A channel that is negative less often than this has no useful mean of its negative values."""


def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    r"""The mean of each channel's negative values, from the batch norm that gives the channel.

    With ``x ~ N(bias, weight^2)``: ``E[x | x < 0] = mu - s phi(mu / s) / Phi(-mu / s)``, ``mu =
    bias``, ``s = |weight|``, ``phi`` and ``Phi`` the density and distribution of the standard
    normal; ``-3 s`` where ``Phi(-mu / s) <= 0.001``, as in the authors' public code (Heo et al.
    2019, section 3).

    Args:
        weight: of the batch norm, ``(C,)``.
        bias: of the batch norm, ``(C,)``.

    Returns:
        ``(C,)`` in the dtype of ``weight``, never positive.
    """
    mean, std = bias.double(), weight.double().abs()
    # A weight of zero is the limit of small ones: a constant, always or never negative.
    ratio = mean / std.clamp_min(torch.finfo(std.dtype).tiny)
    negative = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    margin = torch.where(negative > RARELY, mean - std * density / negative, -3 * std)
    return margin.to(weight.dtype)


def ofd_loss(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    r"""Partial squared distance to the teacher's margin ReLU, averaged over samples only.

    ``1/B sum d``, ``d = (X_s - T)^2`` where ``T > 0`` or ``X_s > T``, else 0; ``T = max(X_t,
    margin)``: a student already below a negative target need not meet it (Heo et al. 2019, section
    3).

    Args:
        student: ``(B, C, H, W)`` before the activation, any floating dtype.
        teacher: same shape and device, before the activation; no gradient reaches it.
        margin: ``(C,)``, as computed by :func:`ofd_margin`.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: maps that differ in shape or device, or a margin that is not one per channel.
    """
    student, teacher = as_maps(student, teacher)
    check_channels(student, margin=margin)
    target = torch.maximum(teacher, margin.to(teacher.dtype)[:, None, None])
    counts = (target > 0) | (student > target)
    return ((student - target).square() * counts).sum() / len(student)


class Connector(nn.Module):
    """Bring the student's map to the teacher's width, by a 1x1 convolution and batch norm.

    Args:
        c_s: channels of the student.
        margin: of the teacher's channels, ``(C_t,)``.
    """

    margin: Tensor

    def __init__(self, c_s: int, margin: Tensor) -> None:
        super().__init__()
        self.layers = pointwise(c_s, len(margin), norm=True)
        nn.init.kaiming_normal_(
            cast(nn.Conv2d, self.layers[0]).weight, mode="fan_out", nonlinearity="relu"
        )
        self.register_buffer("margin", margin)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """:func:`ofd_loss` of two maps, the larger one pooled to the size of the smaller."""
        student, teacher = at_one_size(student, teacher)
        return ofd_loss(adapt(self.layers, student), teacher, self.margin)


class OFD(StagewiseLoss):
    """:func:`ofd_loss` for several stages: ``{"loss_ofd_<stage>"}``.

    Stage ``i`` of ``L`` is weighted by ``1 / 2^(L - i)``: the last one by 1, each earlier one half
    as much as the next. A :class:`Connector` for each stage, made by :meth:`prepare`, is trained
    with the student.

    Args:
        stages: names of the tapped feature maps before their activation, from shallow to deep.
        weight: factor of all terms; Heo et al. use 1e-3 for CIFAR and 1e-4 for ImageNet.
    """

    needs_context = True

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("stage1_preact", "stage2_preact", "stage3_preact"),
        weight: float = 1e-3,
    ) -> None:
        check_weights(weight=weight)
        halvings = reversed(range(len(as_stages(stages))))
        super().__init__(stages, [weight / 2**halved for halved in halvings])
        self.connectors = ModulesByTap()

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the connector of each stage, with the margin of the teacher's batch norm.

        Raises:
            ValueError: a stage whose batch norm ``context.teacher_norms`` lacks.
        """
        teacher = self.need(teacher, "teacher")
        for stage in self.taps:
            feature, other = student.feature(stage), teacher.feature(stage)
            at_one_size(feature, other)  # rejects features that are not maps
            margin = _margin(context, stage, channels=other.shape[1])
            self.connectors[stage] = fit(Connector(feature.shape[1], margin), feature)

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        """:func:`ofd_loss` of the connector's output."""
        connector = prepared(self.connectors, "OFD")[stage]
        return connector(*as_samples(student, teacher, widen=False))


def _margin(context: Context, stage: str, channels: int) -> Tensor:
    """The margin of the teacher's channels at a stage."""
    norms = context.teacher_norms
    if stage not in norms:
        raise ValueError(
            f"context.teacher_norms: OFD takes the margin of {stage!r} from the batch norm before "
            f"the teacher's activation; norms are known for {sorted(norms)}. Use those stages"
        )
    weight, bias = (value.detach() for value in norms[stage])
    if not weight.shape == bias.shape == (channels,):
        raise ValueError(
            f"context.teacher_norms: the norm of {stage!r} must have weight and bias for the "
            f"teacher's {channels} channels, got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    return ofd_margin(weight, bias)
