"""RoI KD: a box head imitates the teacher's on the same proposals (Chen et al., NIPS 2017)."""

from __future__ import annotations

from torch import Tensor

from pcka.losses.base import NO_CONTEXT, Context, Loss, Outputs, Term
from pcka.losses.checks import check_temperature, check_weights, ready, unlike
from pcka.losses.heads import RegionHead
from pcka.losses.kd import kd_loss


def roi_boxes_loss(student: Tensor, teacher: Tensor, scores: Tensor) -> Tensor:
    r"""Differences of the boxes' shifts, weighted by how sure the teacher is of each class.

    ``sum_rk p_rk |d^s_rk - d^t_rk|_1 / max(1, sum_rk p_rk)``, ``p = softmax(t)`` without the
    background. Instead of the label-based bound of Chen et al. 2017, section 3.3, the teacher's
    scores decide where its boxes are meaningful.

    Args:
        student: ``(R, K, 4)``, or ``(R, 1, 4)`` if class-agnostic, any floating dtype.
        teacher: same shape and device; no gradient reaches it.
        scores: ``(R, K + 1)``, the teacher's logits, the background last.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: shifts of different shapes, or scores of other proposals or classes.
    """
    if student.dim() != 3 or student.shape != teacher.shape:
        way_out = "Both box heads need the same classes, and both one box a class or one for all"
        raise unlike(student.shape, teacher.shape, "shifts of one shape (R, K, 4)", way_out)
    student, teacher = ready(student, teacher)
    sure = scores.detach().to(student.dtype).softmax(1)[:, :-1]
    if student.shape[1] == 1:
        sure = sure.sum(1, keepdim=True)
    if sure.shape != student.shape[:2]:
        raise ValueError(
            f"scores must be (R, K + 1) of the shifts (R, K, 4) or (R, 1, 4), got "
            f"{tuple(scores.shape)} and {tuple(student.shape)}"
        )
    return (sure * (student - teacher).abs().sum(2)).sum() / sure.sum().clamp_min(1)


class RoIKD(Loss):
    """:func:`pcka.losses.kd_loss` on the classes and :func:`roi_boxes_loss`, proposal by proposal.

    ``{"loss_roikd_cls", "loss_roikd_box"}``, on the proposals of the teacher. Chen et al. 2017,
    section 3.2, weight the background by 1.5 in the first; here all classes count equally.

    Args:
        cls_weight: factor of the classes' term.
        box_weight: factor of the boxes' term; 0 leaves it out.
        temperature: ``T > 0``, divides logits.
        proposals: how many of the teacher's best proposals per image are compared.
    """

    needs_head = RegionHead

    def __init__(
        self,
        *,
        cls_weight: float = 1.0,
        box_weight: float = 1.0,
        temperature: float = 1.0,
        proposals: int = 256,
    ) -> None:
        super().__init__()
        check_weights(cls_weight=cls_weight, box_weight=box_weight)
        check_temperature(temperature)
        self.cls_weight, self.box_weight = cls_weight, box_weight
        if not isinstance(proposals, int) or proposals < 1:
            raise ValueError(f"proposals must be a positive number of boxes, got {proposals!r}")
        self.temperature = temperature
        self.proposals = proposals

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make nothing, but reject heads that cannot be compared before training starts."""
        self.terms(student, teacher, None)

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """One term for the classes, and one for the boxes."""
        own = self._regions(student, "student")
        other = self._regions(self.need(teacher, "teacher"), "teacher")
        classes = kd_loss(own.logits, other.logits, temperature=self.temperature)
        terms = {f"loss_{self.log_name}_cls": Term(self.cls_weight, classes)}
        if self.box_weight:
            boxes = roi_boxes_loss(own.deltas, other.deltas, other.logits)
            terms[f"loss_{self.log_name}_box"] = Term(self.box_weight, boxes)
        return terms

    def _regions(self, outputs: Outputs, role: str) -> RegionHead:
        if not isinstance(outputs.head, RegionHead):
            raise ValueError(
                f"{role}.head: {type(self).__name__} needs a region head's output, got "
                f"{type(outputs.head).__name__}; use a detector that has one"
            )
        return outputs.head
