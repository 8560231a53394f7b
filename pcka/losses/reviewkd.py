"""ReviewKD: distil shallow features fused with deeper ones (Chen et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcka.losses.adapters import ModulesByTap, adapt, fit, pointwise, prepared
from pcka.losses.base import NO_CONTEXT, Context, Loss, Outputs, Term
from pcka.losses.checks import as_maps, as_samples, as_stages, check_counts, check_weights

PYRAMID = (4, 2, 1)
"""Sides of the pooled maps of the hierarchical context loss."""


def hcl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Hierarchical context loss: mean squared differences of a map and of its poolings.

    ``sum_k w_k mean((P_k(X_s) - P_k(X_t))^2) / sum_k w_k`` with ``w_k = 1, 1/2, 1/4, ...``: ``P_0``
    is the map itself, the others are adaptive averages to 4x4, 2x2 and 1x1, but only those smaller
    than the map (Chen et al. 2021, section 3.3, figure 3b; weights as in the authors' public code).

    Args:
        student: ``(B, C, H, W)``, any floating dtype.
        teacher: same shape and device; no gradient reaches it.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: maps that differ in shape or device.
    """
    student, teacher = as_maps(student, teacher)
    difference = student - teacher  # pooling is linear
    sides = [side for side in PYRAMID if side < min(difference.shape[2:])]
    levels = [difference, *(F.adaptive_avg_pool2d(difference, side) for side in sides)]
    weights = [0.5**k for k in range(len(levels))]
    terms = [w * level.square().mean() for w, level in zip(weights, levels, strict=True)]
    return torch.stack(terms).sum() / sum(weights)


class Fusion(nn.Module):
    """Attention-based fusion (ABF) of a stage with the deeper ones (Chen et al. 2021, figure 3a).

    ``z = a_1 * conv1(x) + a_2 * up(deeper)``, ``a = sigmoid(conv([conv1(x), up(deeper)]))`` one map
    each; then ``z`` is resized (nearest) to the teacher's size, and ``conv3(z)`` is compared with
    the teacher. ``conv1`` and ``conv3`` end with batch norm.

    Args:
        c_s: channels of the student.
        width: channels of ``z``, the same at all stages.
        c_t: channels of the teacher.
        deepest: there is no deeper stage: ``z = conv1(x)``.
    """

    def __init__(self, c_s: int, width: int, c_t: int, *, deepest: bool) -> None:
        super().__init__()
        self.reduce = pointwise(c_s, width, norm=True)
        self.attention = (
            None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        )
        conv = nn.Conv2d(width, c_t, 3, padding=1, bias=False)
        self.expand = nn.Sequential(conv, nn.BatchNorm2d(c_t))
        for layers in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(cast(nn.Conv2d, layers[0]).weight, a=1)

    def forward(
        self, x: Tensor, deeper: Tensor | None, size: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return ``conv3(z)`` and ``z``.

        Args:
            x: the student's ``(B, C_s, H, W)``.
            deeper: ``z (B, width, H', W')`` of the next deeper stage; None for the deepest.
            size: ``(H_t, W_t)`` of the teacher.
        """
        z = adapt(self.reduce, x)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, z.shape[2:], mode="nearest")
            own, other = self.attention(torch.cat([z, deeper], dim=1)).split(1, dim=1)
            z = own * z + other * deeper
        z = F.interpolate(z, tuple(size), mode="nearest")
        return self.expand(z), z


class ReviewKD(Loss):
    """:func:`hcl_loss` of every stage, fused with all deeper ones: ``{"loss_reviewkd_<stage>"}``.

    From the pooled features to the shallowest stage, a :class:`Fusion` combines each stage of the
    student with the previous result, and its output imitates the teacher's stage. The fusions,
    made by :meth:`prepare`, are trained with the student.

    Args:
        stages: names of the tapped feature maps before their activation, from shallow to deep.
        pooled: name of the tapped pooled features, the deepest stage.
        weight: factor of all terms; Chen et al. use 5 for most pairs, warmed up over 20 epochs.
        max_width: upper bound of the fusions' width, which is otherwise that of the student's
            pooled features.
    """

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("stage1_preact", "stage2_preact", "stage3_preact"),
        pooled: str = "pooled",
        weight: float = 5.0,
        max_width: int = 512,
    ) -> None:
        super().__init__()
        self.taps = as_stages((*as_stages(stages), pooled))
        check_weights(weight=weight)
        check_counts(max_width=max_width)
        self.weight = weight
        self.max_width = max_width
        self.fusions = ModulesByTap()

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the fusion of each stage."""
        teacher = self.need(teacher, "teacher")
        deepest = self.taps[-1]
        width = min(self.max_width, student.feature(deepest).shape[1])
        for stage in self.taps:
            feature, other = _as_map(student, stage), _as_map(teacher, stage)
            fusion = Fusion(feature.shape[1], width, other.shape[1], deepest=stage == deepest)
            self.fusions[stage] = fit(fusion, feature)

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """One term per stage, including the pooled features."""
        teacher = self.need(teacher, "teacher")
        fusions = prepared(self.fusions, "ReviewKD")
        terms, deeper = {}, None
        for stage in reversed(self.taps):
            pair = _as_map(student, stage), _as_map(teacher, stage)
            feature, other = as_samples(*pair, widen=False)
            fused, deeper = fusions[stage](feature, deeper, other.shape[2:])
            terms[f"loss_{self.log_name}_{stage}"] = Term(self.weight, hcl_loss(fused, other))
        return dict(reversed(terms.items()))


def _as_map(outputs: Outputs, stage: str) -> Tensor:
    """The feature as ``(B, C, H, W)``; pooled features have one position."""
    feature = outputs.feature(stage)
    if feature.dim() not in (2, 4):
        raise ValueError(
            f"{stage} must be a feature map (B, C, H, W) or pooled features (B, D), got "
            f"{tuple(feature.shape)}; tap another module"
        )
    return feature if feature.dim() == 4 else feature[:, :, None, None]
