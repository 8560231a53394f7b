"""PCKA: align the patches of dense feature maps (Zhou et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from pcka.losses.base import Outputs, StagewiseLoss, Term
from pcka.losses.checks import as_maps, as_names, for_each
from pcka.losses.numerics import CONSTANT_UP_TO, leave_out_constant
from pcka.ops import patch_cka
from pcka.ops.functional import GROUPINGS, RELATIONS, as_patch_size, check_choice

PatchSize = int | tuple[int, int]


def pcka_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    patch_size: PatchSize = 16,
    group_by: str = "channel",
    relation: str = "rows",
    center: bool = True,
    level: str = "pcka_loss",
) -> Tensor:
    r"""``1 - mean over groups`` of the alignment between the patches of two feature maps.

    ``1 - 1/G sum_g CKA(X_s,g, X_t,g)``, ``X (G, N, D)`` the patches of :func:`pcka.patch_cka`
    (Zhou et al. 2024, section 4.2; grouping: its figure 4).

    Args:
        student: ``(B, C, H, W)``, any floating dtype.
        teacher: same shape and device; no gradient reaches it.
        patch_size: ``P`` or ``(P_H, P_W)``, in pixels of the map.
        group_by: ``"channel"`` (the method), ``"batch"`` or ``"position"``.
        relation: ``"rows"`` between patches, ``"columns"`` between the entries of a patch.
        center: center the Gram matrices.
        level: name of this level in the warning about a degenerate map.

    Returns:
        A scalar in [0, 1]: float32, or float64 for float64 input. If the shape makes the alignment
        constant (one row in the Gram matrices, or two when centered), it is 0 with gradient 0.

    Raises:
        ValueError: as :func:`pcka.patch_cka`.
    """
    student, teacher = as_maps(student, teacher, widen=False)
    alignment = patch_cka(
        student,
        teacher,
        patch_size=patch_size,
        group_by=group_by,
        relation=relation,
        center=center,
    )
    samples, up_to = _gram_side(student, patch_size, group_by, relation), CONSTANT_UP_TO[center]
    return leave_out_constant(1 - alignment.mean(), samples=samples, up_to=up_to, level=level)


def _gram_side(x: Tensor, patch_size: PatchSize, group_by: str, relation: str) -> int:
    """``N`` of ``X (G, N, D)``, the number of patches, for ``"rows"``; ``D`` for ``"columns"``."""
    b, c, h, w = x.shape
    p_h, p_w = as_patch_size(patch_size)
    if relation == "rows":
        return -(-h // p_h) * -(-w // p_w)
    return {"channel": b * p_h * p_w, "batch": c * p_h * p_w, "position": b * c}[group_by]


def as_patches(
    stages: Sequence[str], patch_sizes: PatchSize | Sequence[PatchSize]
) -> tuple[PatchSize, ...]:
    """The patch size of each stage; rejects invalid sizes, or a wrong number of them."""
    each: tuple[PatchSize, ...] = for_each(stages, "patch_sizes", cast(Any, patch_sizes))
    for patch in each:
        as_patch_size(patch)
    return each


class PCKA(StagewiseLoss):
    """:func:`pcka_loss` for several levels and relations: ``{"loss_pcka_<stage>_<relation>"}``.

    Args:
        stages: names of the tapped feature maps.
        weights: factor of each stage's terms, or a single one for all.
        patch_sizes: patch size of each stage, ``P`` or ``(P_H, P_W)``, in pixels of its map; a
            single ``P`` serves all stages.
        relations: which of ``"rows"`` and ``"columns"`` to align, one term each.
        group_by, center: of :func:`pcka_loss`.
        background: factor of both maps outside the objects' boxes, from 0 to 1; below 1 the loss
            needs the boxes, and patches count by how much of an object they contain. 1 is the
            published method; less is our addition, with the foreground of
            :class:`pcka.losses.FGD`.

    Raises:
        ValueError: no relation, an unknown one or one twice, an unknown grouping, an invalid patch
            size, or a ``background`` outside [0, 1].
    """

    relational = True
    same_shape = True

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("last",),
        weights: float | Sequence[float] = (10.0,),
        patch_sizes: PatchSize | Sequence[PatchSize] = (16,),
        group_by: str = "channel",
        relations: Sequence[str] = ("rows",),
        center: bool = True,
        background: float = 1.0,
    ) -> None:
        super().__init__(stages, weights)
        if not 0 <= background <= 1:
            raise ValueError(f"background must be a factor from 0 to 1, got {background}")
        self.background = background
        self.needs_boxes = background < 1
        self.patch_sizes = as_patches(stages, patch_sizes)
        check_choice("group_by", group_by, GROUPINGS)
        self.relations = as_names("relations", relations)
        for relation in self.relations:
            check_choice("relations", relation, RELATIONS)
        if not relations:
            raise ValueError(f"relations must hold one or more of {', '.join(RELATIONS)}; got none")
        self.group_by = group_by
        self.center = center

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """One term per stage and relation."""
        terms = {}
        for (stage, weight, own, other), patch in zip(
            self.pairs(student, teacher), self.patch_sizes, strict=True
        ):
            if self.needs_boxes:
                shown = self._shown(own, self.need(target, "target"))
                own, other = own * shown, other * shown
            for relation in self.relations:
                name = f"loss_{self.log_name}_{stage}_{relation}"
                loss = pcka_loss(
                    own,
                    other,
                    patch_size=patch,
                    group_by=self.group_by,
                    relation=relation,
                    center=self.center,
                    level=name,
                )
                terms[name] = Term(weight, loss)
        return terms

    def _shown(self, maps: Tensor, boxes: Tensor) -> Tensor:
        """``(B, 1, H, W)``: 1 in the objects, ``background`` elsewhere."""
        from pcka.losses.foreground import foreground_scale  # the method itself needs no boxes

        batch, _, height, width = maps.shape
        inside = foreground_scale(boxes, batch, (height, width))[:, None] > 0
        return inside.to(maps.dtype).clamp_min(self.background)
