"""Losses that compare one pair of features at a time, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from pcka.losses.adapters import adapted, fit_widths
from pcka.losses.base import NO_CONTEXT, Loss
from pcka.losses.checks import as_stages, as_weights, require
from pcka.losses.map_size import at_one_size
from pcka.losses.outputs import Context, Outputs


class StagewiseLoss(Loss):
    """``weight * compare(student, teacher)`` of each stage: ``{"loss_<method>_<stage>"}``.

    The method is the name of the subclass in lower case.

    Args:
        stages: names of the tapped features.
        weights: factor of each stage's term, or one of all.
    """

    def __init__(self, stages: Sequence[str], weights: float | Sequence[float]) -> None:
        super().__init__()
        self.taps = as_stages(stages)
        self.weights = as_weights(stages, weights)

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


class MatchedMapsLoss(StagewiseLoss):
    """A :class:`StagewiseLoss` of maps of one shape, to which it brings what differs.

    Where the widths of a stage differ, the student's map goes through a 1x1 convolution that
    :meth:`prepare` makes, trained with the student; where the sizes differ, the larger map is
    pooled. Maps of one shape are compared as they are.
    """

    def __init__(self, stages: Sequence[str], weights: float | Sequence[float]) -> None:
        super().__init__(stages, weights)
        self.adapters = nn.ModuleDict()

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the convolutions."""
        teacher = require(teacher, "teacher", type(self).__name__)
        for stage in self.taps:
            at_one_size(student.feature(stage), teacher.feature(stage))  # refuses what is no map
        self.adapters = fit_widths(student, teacher, self.taps)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Tensor]:
        return super().forward(self._adapted(student), teacher, target)

    def matched(
        self, student: Outputs, teacher: Outputs | None
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each stage with the student's and the teacher's map, brought to one shape.

        For losses that take maps of any dtype as they are: those of one shape stay so.
        """
        teacher = require(teacher, "teacher", type(self).__name__)
        student = self._adapted(student)
        for stage in self.taps:
            own, other = student.feature(stage), teacher.feature(stage)
            if own.shape[2:] != other.shape[2:]:
                own, other = at_one_size(own, other)
            if stage in self.adapters:  # which may have changed the dtype
                other = other.to(own.dtype)
            yield stage, own, other

    def _adapted(self, student: Outputs) -> Outputs:
        name = type(self).__name__
        return adapted(student, self.adapters, name) if self.adapters else student
