"""IFVD: how the features of a class vary about their mean (Wang et al., ECCV 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import NO_CONTEXT, Context, Outputs, Term
from pcka.losses.checks import WHERE_MAPS_ARE, as_samples, unlike
from pcka.losses.numerics import at_one_size, without_autocast
from pcka.losses.pixelkd import PixelLoss


@without_autocast
def ifvd_loss(student: Tensor, teacher: Tensor, labels: Tensor, classes: int) -> Tensor:
    r"""Squared differences of each position's similarity to the mean of its class.

    ``1 / (B H W) sum_p (M_s(p) - M_t(p))^2`` with ``M(p) = cos(f(p), m_c(p))``, ``c`` the class of
    the position and ``m_c`` the mean feature of the positions of that class in its image (Wang
    et al., "Intra-class Feature Variation Distillation for Semantic Segmentation", ECCV 2020,
    equations 1 to 3). Positions without a class add 0. For a feature of zeros, ``M`` is 0.

    Args:
        student: ``(B, C_s, H, W)`` features, any floating dtype.
        teacher: ``(B, C_t, H, W)`` features on the same device; no gradient reaches it.
        labels: ``(B, H', W')`` int64, from 0 to ``classes - 1``, or -1 if ignored; resized to the
            features by nearest neighbour.
        classes: number of classes.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: features that differ in size, device or batch size, or labels that do not match.
    """
    student, teacher = as_samples(student, teacher)
    if student.dim() != 4 or teacher.dim() != 4 or student.shape[2:] != teacher.shape[2:]:
        wanted = "feature maps (B, C, H, W) of the same H and W"
        raise unlike(student.shape, teacher.shape, wanted, WHERE_MAPS_ARE)
    if labels.dim() != 3 or len(labels) != len(student) or labels.is_floating_point():
        raise ValueError(
            f"labels must hold the class of each pixel, ({len(student)}, H, W) int64; got "
            f"{tuple(labels.shape)} {labels.dtype}"
        )
    size = student.shape[2:]
    nearest = F.interpolate(labels[:, None].float(), size, mode="nearest").flatten(1).long()
    members = F.one_hot(nearest + 1, classes + 1)[..., 1:].to(student.dtype)
    own, other = (_likeness(x.flatten(2).mT, members) for x in (student, teacher))
    return (own - other).square().mean()


def _likeness(features: Tensor, members: Tensor) -> Tensor:
    """Cosines ``M (B, N)``, from features ``(B, N, C)`` and one-hot classes ``(B, N, K)``."""
    counts = members.sum(1).clamp_min(1)
    means = members.mT @ features / counts[..., None]
    return (_unit(features) * (members @ _unit(means))).sum(-1)


def _unit(x: Tensor) -> Tensor:
    """``x / ||x||``; zeros stay zero, and get the gradient of ``x`` itself, not of ``0 / 0``."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1)


class IFVD(PixelLoss):
    """:func:`ifvd_loss` on the input of the head's last layer: ``{"loss_ifvd"}``.

    Both models' features are pooled to the smaller size; their widths may differ.

    Args:
        weight: factor of the term; 200 in the authors' public code.
    """

    def __init__(self, *, weight: float = 200.0) -> None:
        super().__init__(weight)

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make nothing, but reject models without such a head before training starts."""
        self.heads(student, teacher)

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """The single term."""
        own, other = self.heads(student, teacher)
        labels = self.need(own.labels, "student.head.labels")
        features = at_one_size(own.features, other.features)
        value = ifvd_loss(*features, labels, own.logits.shape[1])
        return {f"loss_{self.log_name}": Term(self.weight, value)}
