"""CC: keep the correlations between samples (Peng et al., ICCV 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcka.losses.adapters import ModulesByTap, PooledLinear, adapt, fit, prepared
from pcka.losses.base import NO_CONTEXT, Context, Outputs, StagewiseLoss
from pcka.losses.checks import as_samples, check_counts, unlike
from pcka.losses.numerics import leave_out_constant, without_autocast
from pcka.ops.reference import accumulation_dtype


@without_autocast
def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""``||T T^T - S S^T||_F / B^2``: the bilinear form of the correlations.

    Peng et al. 2019, equations 5 and 7, without their kernel's Taylor series.

    Args:
        student: ``(B, ...)``, flattened to ``(B, D)``, any floating dtype.
        teacher: ``(B, ...)`` of the same samples, on the same device; no gradient reaches it.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: features of different batch sizes.
    """
    s, t = (x.flatten(1) for x in as_samples(student, teacher))
    return (t @ t.T - s @ s.T).norm() / student.shape[0] ** 2


def cc_neighbours_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""``1/(B - 1) sum_i sum_d |D_i,d| |D_i+1,d|``, ``D = S - T``: the form in common use.

    It multiplies the differences of neighbouring samples of a batch. The authors of Peng et al.
    2019 gave this form to those of Tian et al. 2020, whose public code contains it.

    Args:
        student: ``(B, D)`` embeddings, any floating dtype.
        teacher: same shape and device. Gradients reach it: both embeddings are trained.

    Returns:
        A scalar: float32, or float64 for float64 input; 0 with gradient 0 for a single sample.

    Raises:
        ValueError: embeddings of different shapes.
    """
    as_samples(student, teacher)  # rejects what cannot be compared
    if student.dim() != 2 or student.shape != teacher.shape:
        wanted = "embeddings of one shape (B, D)"
        raise unlike(student.shape, teacher.shape, wanted, "Use the same width")
    dtype = accumulation_dtype(torch.promote_types(student.dtype, teacher.dtype))
    distance = (student.to(dtype) - teacher.to(dtype)).abs()
    loss = (distance[:-1] * distance[1:]).sum() / max(len(distance) - 1, 1)
    return leave_out_constant(loss, samples=distance.shape[0], up_to=1, level="cc_neighbours_loss")


FORMS = {"neighbours": cc_neighbours_loss, "bilinear": cc_loss}


class CC(StagewiseLoss):
    """Correlations between samples at several stages: ``{"loss_cc_<stage>"}``.

    Args:
        stages: names of the tapped features.
        weights: factor of each stage's term, or a single one for all.
        form: ``"neighbours"`` (:func:`cc_neighbours_loss`), on both models' features, each embedded
            by a trained linear layer, maps averaged over their positions; or ``"bilinear"``
            (:func:`cc_loss`), on the features themselves.
        embedding: width of the embeddings.
    """

    relational = True

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("pooled",),
        weights: float | Sequence[float] = (0.02,),
        form: str = "neighbours",
        embedding: int = 128,
    ) -> None:
        super().__init__(stages, weights)
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
        check_counts(embedding=embedding)
        self.form = form
        self.embedding = embedding
        self.student_embeddings = ModulesByTap()
        self.teacher_embeddings = ModulesByTap()

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make both models' embedding layers for each stage."""
        if self.form != "neighbours":
            return
        teacher = self.need(teacher, "teacher")
        for stage in self.taps:
            self.student_embeddings[stage] = self._embedding_of(student.feature(stage))
            self.teacher_embeddings[stage] = self._embedding_of(teacher.feature(stage))

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        """The loss in the chosen form."""
        if self.form == "neighbours":
            student = adapt(prepared(self.student_embeddings, "CC")[stage], student)
            teacher = adapt(prepared(self.teacher_embeddings, "CC")[stage], teacher.detach())
        return FORMS[self.form](student, teacher)

    def _embedding_of(self, feature: Tensor) -> PooledLinear:
        return fit(PooledLinear(feature.shape[1], self.embedding), feature)
