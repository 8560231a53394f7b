"""CrossKD: the student's features through the teacher's head (Wang et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcka.losses.adapters import ModulesByTap, adapt, fit, pointwise
from pcka.losses.base import NO_CONTEXT, Context, Outputs
from pcka.losses.densekd import DenseLoss
from pcka.losses.heads import Dense, DenseHead
from pcka.ops.reference import accumulation_dtype

EPSILON = 1e-12  # added to a variance


def at_scale(student: Tensor, teacher: Tensor) -> Tensor:
    """``(B, C, H, W)``, each channel with the teacher's mean and standard deviation.

    ``(s - mean(s)) / sqrt(var(s) + 1e-12) * sqrt(var(t)) + mean(t)``, over images and positions.
    A constant channel becomes the teacher's mean.
    """
    exact = student.to(accumulation_dtype(student.dtype))
    over = (0, 2, 3)
    variance, mean = torch.var_mean(exact, over, correction=0, keepdim=True)
    wanted, center = torch.var_mean(
        teacher.detach().to(exact.dtype), over, correction=0, keepdim=True
    )
    scaled = (exact - mean) / (variance + EPSILON).sqrt() * wanted.sqrt() + center
    return scaled.to(student.dtype)


class CrossKD(DenseLoss):
    r"""Match the teacher with what the rest of its head predicts from the student's features.

    ``{"loss_crosskd_cls", "loss_crosskd_box"}``. With ``f`` the student's maps after the first
    ``depth`` convolutions of its head, ``h`` the teacher's head after as many, and ``t`` the
    teacher's predictions, :func:`pcka.losses.dense_scores_loss` and
    :func:`pcka.losses.dense_boxes_loss` compare ``h(f)`` with ``t`` (Wang et al. 2024, section 3).
    The teacher's predictions and the labels thus never supervise the same layer. The maps cross
    before a ReLU, and each channel of a level is rescaled to the teacher's mean and standard
    deviation over images and positions, as in the authors' public code: early in training, the
    student's maps would leave the range that the teacher's layers know. Where the heads' widths
    differ, the student's maps first pass a 1x1 convolution, one per branch for all levels.

    The defaults are the authors' for RetinaNet. For FCOS they use ``cls_weight`` 0.4,
    ``box_weight`` 0.75 (of the IoU), ``depth`` 2; for GFL ``box_weight`` 2. They divide by the
    number of positive anchors of the labels, this library by the number of objects that the teacher
    sees.

    Args:
        cls_weight: factor of the scores' term.
        box_weight: factor of the boxes' term; 0 leaves it out.
        depth: convolutions of a branch before the crossing, at least 1.
        beta: exponent of the difference that weights a score in
            :func:`pcka.losses.dense_scores_loss`.
    """

    def __init__(
        self,
        *,
        cls_weight: float = 1.0,
        box_weight: float = 1.0,
        depth: int = 3,
        beta: float = 1.0,
    ) -> None:
        super().__init__(cls_weight, box_weight, beta)
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth must be a positive number of convolutions, got {depth!r}")
        self.head_depth = depth
        self.adapters = ModulesByTap()

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the convolution of each branch whose widths differ."""
        own, other = self.heads(student, teacher)
        for branch, maps in own.inner.items():
            widths = maps[0].shape[1], other.inner[branch][0].shape[1]
            if widths[0] != widths[1] and self._compares(branch):
                self.adapters[branch] = fit(pointwise(*widths), maps[0])
        self.terms(student, teacher, None)  # rejects heads with different levels

    def predictions(self, student: DenseHead, teacher: DenseHead) -> tuple[Dense, Dense]:
        """The crossed predictions and the teacher's own."""
        rest = self.need(teacher.rest, "teacher.head.rest")
        inner = {
            branch: self._crossed(branch, maps, other) if self._compares(branch) else other
            for (branch, maps), other in zip(student.inner.items(), teacher.inner.values())
        }
        return rest(inner), self.need(teacher.predictions, "teacher.head.predictions")

    def _crossed(
        self, branch: str, maps: Sequence[Tensor], other: Sequence[Tensor]
    ) -> list[Tensor]:
        """The student's maps of a branch, adapted to the teacher's layers."""
        if len(maps) != len(other):
            raise ValueError(
                f"student and teacher have {len(maps)} and {len(other)} levels; both heads need "
                "the same levels, anchors and classes"
            )
        return [at_scale(self._adapted(branch, x), y) for x, y in zip(maps, other)]

    def _compares(self, branch: str) -> bool:
        """Whether a branch is compared; if not, the teacher's own maps take its place."""
        return branch != "box" or self.box_weight > 0

    def _adapted(self, branch: str, x: Tensor) -> Tensor:
        return adapt(self.adapters[branch], x) if branch in self.adapters else x
