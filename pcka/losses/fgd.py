"""FGD: imitate objects, background and global relations separately (Yang et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcka.losses.adapters import ModulesByTap, adapt, fit_maps, prepared
from pcka.losses.base import NO_CONTEXT, Context, Outputs, StagewiseLoss, Term
from pcka.losses.checks import as_maps, check_temperature, check_weights
from pcka.losses.foreground import foreground_scale


def fgd_loss(
    student: Tensor,
    teacher: Tensor,
    boxes: Tensor,
    *,
    foreground: float = 1e-3,
    background: float = 5e-4,
    attention: float = 5e-4,
    temperature: float = 0.5,
) -> Tensor:
    r"""Focal distillation: squared differences, weighted by objects and the teacher's attention.

    ``1/B sum_bkij (alpha S_ij + beta S'_ij) A^S_ij A^C_k (X_t - X_s)^2
    + gamma/B (|A^S_t - A^S_s|_1 + |A^C_t - A^C_s|_1)``. ``S`` is ``1 / (H_r W_r)`` in the object
    ``r`` (:func:`pcka.losses.foreground.foreground_scale`), ``S'`` one over the number of
    background positions at each of them; ``A^S = H W softmax(mean_k |X| / T)`` over positions and
    ``A^C = C softmax(mean_ij |X| / T)`` over channels, the teacher's in the first sum (Yang et al.
    2022, equations 2 to 9, with the mean over images of the authors' code).

    Args:
        student: ``(B, C, H, W)``, any floating dtype.
        teacher: same shape and device; no gradient reaches it.
        boxes: boxes of the objects, ``(M, 5)`` as described in ``Loss.needs_boxes``.
        foreground: ``alpha``. In the authors' public configurations, 1e-3 for RetinaNet and GFL,
            1.6e-3 for FCOS and RepPoints, 5e-5 for Faster R-CNN.
        background: ``beta``; in those configurations half of ``alpha``.
        attention: ``gamma``; in those configurations 5e-4, 8e-4 and 5e-5.
        temperature: ``T > 0``, divides the mean magnitudes.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: maps that differ in shape or device, malformed boxes, or factors that are
            negative or not finite.
    """
    student, teacher = as_maps(student, teacher)
    check_temperature(temperature)
    check_weights(foreground=foreground, background=background, attention=attention)
    b, _, h, w = student.shape
    scale = foreground_scale(boxes.to(student.dtype), b, (h, w))
    outside = (scale == 0).to(scale.dtype)
    rest = outside / outside.sum((1, 2), keepdim=True).clamp_min(1)
    places, channels = _attention(teacher, temperature)
    own_places, own_channels = _attention(student, temperature)
    weights = (foreground * scale + background * rest) * places
    squares = (channels[:, :, None, None] * (teacher - student).square()).sum(1)
    apart = (places - own_places).abs().sum() + (channels - own_channels).abs().sum()
    return ((weights * squares).sum() + attention * apart) / b


def _attention(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``A^S (B, H, W)``, with mean 1 over the positions, and ``A^C (B, C)``, over the channels."""
    magnitude = x.abs()
    places, channels = magnitude.mean(1).flatten(1), magnitude.mean((2, 3))
    places, channels = (
        mean.shape[1] * F.softmax(mean / temperature, 1) for mean in (places, channels)
    )
    return places.view(x.shape[0], *x.shape[2:]), channels


def fgd_relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared differences of the maps with their global context, ``1/B sum (R(X_t) - R(X_s))^2``.

    The global term of Yang et al. 2022, equation 11. Both context blocks are trained: gradients
    reach the outputs of both.

    Args:
        student: ``R(X_s) (B, C, H, W)`` of :class:`GlobalContext`, any floating dtype.
        teacher: ``R(X_t)``, same shape and device.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: maps that differ in shape or device.
    """
    own, _ = as_maps(student, teacher)
    return (own - teacher.to(own.dtype)).square().sum() / len(own)


class GlobalContext(nn.Module):
    r"""``R(X) = X + W_2 relu(LN(W_1 sum_j softmax(W_k X)_j X_j))`` (Yang et al. 2022, equation 10).

    The global context block of Cao et al., "GCNet", ICCVW 2019: one context shifts every position.
    The last layer is initialised to 0, so ``R`` starts as the identity.

    Args:
        channels: ``C`` of the maps; ``W_1`` outputs half as many.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = max(1, channels // 2)
        self.where = nn.Conv2d(channels, 1, 1)
        self.shift = nn.Sequential(
            nn.Linear(channels, half), nn.LayerNorm(half), nn.ReLU(), nn.Linear(half, channels)
        )
        nn.init.kaiming_normal_(self.where.weight, nonlinearity="relu")
        for parameter in (cast(Tensor, self.where.bias), *self.shift[-1].parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> the same shape."""
        where = self.where(x).flatten(1).softmax(1).to(x.dtype)
        context = torch.einsum("bn,bcn->bc", where, x.flatten(2))
        return x + self.shift(context)[:, :, None, None].to(x.dtype)


class _Relations(nn.Module):
    """The context blocks of both models at one level."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.student, self.teacher = GlobalContext(student), GlobalContext(teacher)


class FGD(StagewiseLoss):
    """:func:`fgd_loss` and :func:`fgd_relation_loss` for several levels.

    ``{"loss_fgd_<stage>", "loss_fgd_<stage>_relation"}``. Each model has its own
    :class:`GlobalContext` at each level. The defaults are the authors' for RetinaNet; they compare
    all five levels.

    Args:
        stages: names of the tapped feature maps.
        weights: factor of each stage's terms, or a single one for all.
        foreground, background, attention, temperature: of :func:`fgd_loss`.
        relation: factor of the relation term, ``lambda``; the authors use 5e-6 for RetinaNet and
            GFL, 8e-6 for FCOS and RepPoints, 5e-7 for Faster R-CNN; 0 leaves the term out.
    """

    same_shape = True
    needs_boxes = True

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("last",),
        weights: float | Sequence[float] = (1.0,),
        foreground: float = 1e-3,
        background: float = 5e-4,
        attention: float = 5e-4,
        relation: float = 5e-6,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(stages, weights)
        check_weights(
            foreground=foreground, background=background, attention=attention, relation=relation
        )
        check_temperature(temperature)
        self.settings = {
            "foreground": foreground,
            "background": background,
            "attention": attention,
            "temperature": temperature,
        }
        self.relation = relation
        self.adapters = ModulesByTap()

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the context blocks of each level."""
        if self.relation:
            teacher = self.need(teacher, "teacher")
            self.adapters = fit_maps(_Relations, student, teacher, self.taps)

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """Two terms per stage; one without the relation."""
        boxes = self.need(target, "target")
        terms = {}
        for stage, weight, own, other in self.pairs(student, teacher):
            name = f"loss_{self.log_name}_{stage}"
            terms[name] = Term(weight, fgd_loss(own, other, boxes, **self.settings))
            if self.relation:
                blocks = cast(_Relations, prepared(self.adapters, "FGD")[stage])
                related = fgd_relation_loss(
                    adapt(blocks.student, own), adapt(blocks.teacher, other.detach())
                )
                terms[f"{name}_relation"] = Term(weight * self.relation, related)
        return terms
