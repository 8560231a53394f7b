"""Losses that compare one pair of features at a time, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcka.losses.base import Loss
from pcka.losses.checks import check_levels, require
from pcka.losses.outputs import Outputs


class StagewiseLoss(Loss):
    """``weight * compare(student, teacher)`` of each stage: ``{"loss_<method>_<stage>"}``.

    The method is the name of the subclass in lower case.

    Args:
        stages: names of the tapped features.
        weights: factor of each stage's term.
    """

    def __init__(self, stages: Sequence[str], weights: Sequence[float]) -> None:
        super().__init__()
        check_levels(stages, weights=weights)
        self.taps = tuple(stages)
        self.weights = tuple(weights)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one stage, a scalar without its weight."""
        raise NotImplementedError

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Tensor]:
        method = type(self).__name__
        teacher = require(teacher, "teacher", method)
        return {
            f"loss_{method.lower()}_{stage}": weight
            * self.compare(student.feature(stage), teacher.feature(stage))
            for stage, weight in zip(self.taps, self.weights, strict=True)
        }
