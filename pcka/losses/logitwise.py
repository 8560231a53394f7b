"""Losses that compare the logits of both models."""

from __future__ import annotations

import torch
from torch import Tensor

from pcka.losses.base import Loss
from pcka.losses.checks import check_temperature, check_weights, require
from pcka.losses.outputs import Outputs


class LogitLoss(Loss):
    """``weight * compare(student, teacher, target)`` of the logits: ``{"loss_<method>"}``.

    The method is the name of the subclass in lower case.

    Args:
        weight: factor of the term.
        temperature: ``T > 0``, divides logits.
    """

    needs_logits = True

    def __init__(self, weight: float, temperature: float) -> None:
        super().__init__()
        check_weights(weight=weight)
        check_temperature(temperature)
        self.weight = weight
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        """The loss of logits ``(B, P)``, a scalar without its weight."""
        raise NotImplementedError

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Tensor]:
        method = type(self).__name__
        teacher = require(teacher, "teacher", method)
        loss = self.compare(
            require(student.logits, "student.logits", method),
            require(teacher.logits, "teacher.logits", method),
            target,
        )
        return {f"loss_{method.lower()}": self.weight * loss}


def without_target(logits: Tensor, target: Tensor) -> Tensor:
    """The logits of the classes that are not the sample's own.

    By gathering, not by a mask: the host need not wait to learn how many entries a mask picks.

    Args:
        logits: ``(B, P)``.
        target: ``(B,)`` class indices.

    Returns:
        ``(B, P - 1)``, in the order of the classes.
    """
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, columns + (columns >= target[:, None]))
