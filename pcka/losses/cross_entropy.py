"""Cross-entropy with the labels: the task loss of classification."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import Loss
from pcka.losses.checks import check_weights, require
from pcka.losses.outputs import Outputs
from pcka.losses.registry import register
from pcka.ops.reference import accumulation_dtype


@register("CE")
class CE(Loss):
    """Cross-entropy of the student's logits with the target: ``{"loss_ce"}``.

    Args:
        weight: factor of the term.
        label_smoothing: probability mass, in [0, 1], spread evenly over the classes.
    """

    needs_teacher = False
    needs_target = True

    def __init__(self, *, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_weights(weight=weight)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
        self.weight = weight
        self.label_smoothing = label_smoothing

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Tensor]:
        """``target``: ``(B,)`` class indices, or ``(B, P)`` class probabilities."""
        logits = require(student.logits, "student.logits", "CE")
        loss = F.cross_entropy(
            logits.to(accumulation_dtype(logits.dtype)),
            require(target, "target", "CE"),
            label_smoothing=self.label_smoothing,
        )
        return {"loss_ce": self.weight * loss}
