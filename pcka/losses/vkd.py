"""VkD: an orthogonal projection onto normalised features (Miles et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrizations import orthogonal

from pcka.losses.adapters import ModulesByTap, PooledLinear, adapt, fit, pooled, prepared
from pcka.losses.base import NO_CONTEXT, Context, Outputs, StagewiseLoss
from pcka.losses.checks import as_samples, unlike
from pcka.ops.reference import without_autocast


def vkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Smooth L1 distance from projected features to the teacher's standardized ones.

    ``mean huber(P z_s - (z_t - mean(z_t)) / sqrt(var(z_t) + 1e-5))``, with ``huber(x) = x^2 / 2``
    for ``|x| < 1`` and ``|x| - 1/2`` beyond, mean and variance (by ``D``) of each sample over its
    channels (Miles et al., "VkD: Improving Knowledge Distillation using Orthogonal Projections",
    CVPR 2024, the normalisation for discriminative tasks; distance and epsilon as in the authors'
    public code).

    Args:
        student: ``P z_s (B, D)``, any floating dtype.
        teacher: ``z_t (B, D)``, same device; no gradient reaches it.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: features that differ in shape or device.
    """
    student, teacher = as_samples(student, teacher)
    if student.dim() != 2 or student.shape != teacher.shape:
        wanted = "pooled features of one shape (B, D)"
        raise unlike(student.shape, teacher.shape, wanted, "Project the student's features")
    return F.smooth_l1_loss(student, F.layer_norm(teacher, teacher.shape[1:]))


class VKD(StagewiseLoss):
    """:func:`vkd_loss` for several stages: ``{"loss_vkd_<stage>"}``.

    Maps and tokens (tapped as maps by ``:map``) are averaged over their positions, so the loss also
    works between transformers and convolutional networks. A trained projection ``P (D_t, D_s)`` for
    each stage, made by :meth:`prepare`, keeps orthonormal columns, or rows if the student is wider:
    it can rotate the student's features, but cannot learn in their place.

    Args:
        stages: names of the tapped features, vectors or maps.
        weights: factor of each stage's term, or a single one for all.
    """

    capturable = False  # the projection solves a linear system, which the host checks

    def __init__(
        self, *, stages: Sequence[str] = ("last",), weights: float | Sequence[float] = (1.0,)
    ) -> None:
        super().__init__(stages, weights)
        self.projections = ModulesByTap()

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the projection of each stage."""
        teacher = self.need(teacher, "teacher")
        for stage in self.taps:
            own, other = pooled(student.feature(stage)), pooled(teacher.feature(stage))
            linear = PooledLinear(own.shape[1], other.shape[1], bias=False)
            # Cayley's map: Householder's keeps signs among its parameters, which weight decay would
            # shrink, and with them the projection, to 0.
            self.projections[stage] = fit(orthogonal(linear, orthogonal_map="cayley"), own)

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        projection = prepared(self.projections, "VKD")[stage]
        with without_autocast(student.device):  # rounded, the projection is not orthogonal
            projected = adapt(projection, student)
        return vkd_loss(projected, pooled(teacher))
