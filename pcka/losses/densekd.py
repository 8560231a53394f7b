"""Dense KD: a dense head's predictions imitate the teacher's, position by position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import NO_CONTEXT, Context, Loss, Outputs, Term
from pcka.losses.checks import check_weights, ready, unlike
from pcka.losses.heads import Dense, DenseHead

EPSILON = 1e-7  # square pixels


def dense_scores_loss(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    r"""Quality focal loss with the teacher's scores as soft labels.

    ``1/S sum |sigmoid(s) - p|^beta ((1 - p) log 1/(1 - sigmoid(s)) + p log 1/sigmoid(s))``,
    ``p = sigmoid(t)`` (Li et al., "Generalized Focal Loss", NeurIPS 2020, equation 5; with a
    teacher's scores in place of the quality: Wang et al., "CrossKD", CVPR 2024, section 3, with
    ``beta = 1`` in the authors' public code). ``S`` is how many objects the teacher sees, ``max(1,
    sum_r max_k p)``: our choice, which needs no labels; in CrossKD it is the number of positive
    anchors according to the labels.

    Args:
        student: ``(B, R, K)`` logits, any floating dtype.
        teacher: same shape and device; no gradient reaches it.
        beta: 0 (plain cross-entropy) or at least 1: how strongly agreement lowers the weight.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: logits of different shapes, or a ``beta`` without a finite gradient.
    """
    student, teacher = _as_dense(student, teacher)
    check_beta(beta)
    return quality_focal(student, teacher.sigmoid(), beta).sum() / objects_seen(weights_of(teacher))


def quality_focal(logits: Tensor, label: Tensor, beta: float) -> Tensor:
    """The summands of :func:`dense_scores_loss`; ``label`` holds the target scores."""
    distance = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
    return (logits.sigmoid() - label).abs() ** beta * distance if beta else distance


def dense_boxes_loss(student: Tensor, teacher: Tensor, scores: Tensor) -> Tensor:
    r"""``1/S sum_r w_r (1 - GIoU(b_s, b_t))``, weighted by how much of an object the teacher sees.

    ``GIoU = I / U - (C - U) / C`` of intersection, union and enclosing box (Rezatofighi et al.,
    CVPR 2019), ``w_r = max_k sigmoid(t_rk)`` (Wang et al., "CrossKD", CVPR 2024, section 3), and
    ``S = max(1, sum_r w_r)``.

    Args:
        student: ``(B, R, 4)``, x0, y0, x1, y1 in pixels, any floating dtype.
        teacher: same shape and device; no gradient reaches it.
        scores: ``(B, R, K)``, the teacher's logits.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: boxes of different shapes, or scores of other positions.
    """
    student, teacher = _as_dense(student, teacher)
    if student.shape[2] != 4 or scores.shape[:2] != student.shape[:2]:
        raise ValueError(
            f"boxes must be (B, R, 4) and scores (B, R, K) of the same positions; got "
            f"{tuple(student.shape)} and {tuple(scores.shape)}"
        )
    weights = weights_of(scores.detach().to(student.dtype))
    return (weights * (1 - _giou(student, teacher))).sum() / objects_seen(weights)


def objects_seen(weights: Tensor) -> Tensor:
    """``max(1, sum_r w_r)``, the divisor of losses over positions."""
    return weights.sum().clamp_min(1)


def weights_of(logits: Tensor) -> Tensor:
    """``w_r = max_k sigmoid(t_rk)``, ``(B, R, K)`` -> ``(B, R)``: how much of an object is seen."""
    return logits.amax(-1).sigmoid()


def _giou(one: Tensor, other: Tensor) -> Tensor:
    """Generalised intersection over union of pairs of boxes, ``(..., 4)`` -> ``(...)``."""
    start, end = torch.maximum(one, other), torch.minimum(one, other)
    intersection = _area(torch.cat([start[..., :2], end[..., 2:]], -1))
    enclosing = _area(torch.cat([end[..., :2], start[..., 2:]], -1)).clamp_min(EPSILON)
    union = (_area(one) + _area(other) - intersection).clamp_min(EPSILON)
    return intersection / union - (enclosing - union) / enclosing


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1)


def check_beta(beta: float) -> None:
    """Reject an exponent of a difference whose gradient is infinite at a difference of 0."""
    check_weights(beta=beta)
    if 0 < beta < 1:
        raise ValueError(f"beta must be 0, or 1 or more, got {beta}")


def _as_dense(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.dim() != 3 or student.shape != teacher.shape:
        wanted = "predictions of one shape (B, R, ...)"
        way_out = "Both heads need the same levels, anchors and classes"
        raise unlike(student.shape, teacher.shape, wanted, way_out)
    return ready(student, teacher)


class DenseLoss(Loss):
    """Terms that compare two :class:`pcka.losses.heads.Dense`, which a subclass chooses.

    Args:
        cls_weight: factor of :func:`dense_scores_loss`.
        box_weight: factor of :func:`dense_boxes_loss`; 0 leaves the term out.
        beta: of :func:`dense_scores_loss`.
    """

    needs_head = DenseHead

    def __init__(self, cls_weight: float, box_weight: float, beta: float) -> None:
        super().__init__()
        check_weights(cls_weight=cls_weight, box_weight=box_weight)
        check_beta(beta)
        self.cls_weight, self.box_weight, self.beta = cls_weight, box_weight, beta

    def predictions(self, student: DenseHead, teacher: DenseHead) -> tuple[Dense, Dense]:
        """The predictions to compare, the student's and the teacher's."""
        raise NotImplementedError

    def heads(self, student: Outputs, teacher: Outputs | None) -> tuple[DenseHead, DenseHead]:
        """The outputs of both models' heads.

        Raises:
            ValueError: a model without a dense head.
        """
        heads = student.head, self.need(teacher, "teacher").head
        for head, role in zip(heads, ("student", "teacher")):
            if not isinstance(head, DenseHead):
                raise ValueError(
                    f"{role}.head: {type(self).__name__} needs a dense head's output, got "
                    f"{type(head).__name__}; use a detector that has one"
                )
        return heads  # type: ignore[return-value]

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """One term for the scores, and one for the boxes."""
        own, other = self.predictions(*self.heads(student, teacher))
        scores = dense_scores_loss(own.logits, other.logits, beta=self.beta)
        terms = {f"loss_{self.log_name}_cls": Term(self.cls_weight, scores)}
        if self.box_weight:
            boxes = dense_boxes_loss(own.boxes, other.boxes, other.logits)
            terms[f"loss_{self.log_name}_box"] = Term(self.box_weight, boxes)
        return terms


class DenseKD(DenseLoss):
    """The student's own predictions imitate the teacher's.

    ``{"loss_densekd_cls", "loss_densekd_box"}``, :func:`dense_scores_loss` and
    :func:`dense_boxes_loss`. Both heads need the same levels, anchors and classes. Unlike
    :class:`pcka.losses.CrossKD`, this is what Wang et al. 2024 call prediction mimicking: the
    student's last layers learn from the labels and the teacher at the same time.

    Args:
        cls_weight: factor of the scores' term.
        box_weight: factor of the boxes' term; 0 leaves it out.
        beta: of :func:`dense_scores_loss`.
    """

    def __init__(
        self, *, cls_weight: float = 1.0, box_weight: float = 1.0, beta: float = 1.0
    ) -> None:
        super().__init__(cls_weight, box_weight, beta)

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make nothing, but reject heads that cannot be compared before training starts."""
        self.terms(student, teacher, None)

    def predictions(self, student: DenseHead, teacher: DenseHead) -> tuple[Dense, Dense]:
        """Both heads' own predictions."""
        return (
            self.need(student.predictions, "student.head.predictions"),
            self.need(teacher.predictions, "teacher.head.predictions"),
        )
