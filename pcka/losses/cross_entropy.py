"""Cross-entropy with the labels: the task loss of classification."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import Loss, Outputs, Term
from pcka.losses.checks import check_weights
from pcka.ops.reference import accumulation_dtype


class CE(Loss):
    """Cross-entropy of the student's logits with the target: ``{"loss_ce"}``.

    Args:
        weight: factor of the term.
        label_smoothing: probability mass, in [0, 1], spread evenly over the classes.
    """

    needs_teacher = False
    needs_target = True
    needs_logits = True

    def __init__(self, *, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_weights(weight=weight)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
        self.weight = weight
        self.label_smoothing = label_smoothing

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """``target``: ``(B,)`` class indices, or ``(B, P)`` class probabilities."""
        logits = self.need(student.logits, "student.logits")
        loss = F.cross_entropy(
            logits.to(accumulation_dtype(logits.dtype)),
            self.need(target, "target"),
            label_smoothing=self.label_smoothing,
        )
        return {f"loss_{self.log_name}": Term(self.weight, loss)}
