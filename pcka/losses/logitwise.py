"""Losses that compare the logits of both models."""

from __future__ import annotations

import torch
from torch import Tensor

from pcka.losses.base import Loss
from pcka.losses.checks import check_temperature, check_weights, require
from pcka.losses.outputs import Outputs
from pcka.ops.reference import accumulation_dtype

EPSILON = 1e-7


def standardized_logits(logits: Tensor) -> Tensor:
    r"""Z-scores of each sample's logits: how they rank the classes, without shift and scale.

    ``(z - mean(z)) / (std(z) + 1e-7)``, ``std`` with ``P - 1`` (Sun et al., "Logit
    Standardization in Knowledge Distillation", CVPR 2024, and the authors' public code). A student
    that is compared by them need not match the teacher's magnitude.

    Args:
        logits: ``(B, P)``, any floating dtype, ``P >= 2``.

    Returns:
        ``(B, P)``: float32, or float64 for float64 input. Where a sample's logits are all equal,
        0.
    """
    z = logits.to(accumulation_dtype(logits.dtype))
    variance = z.var(-1, keepdim=True)
    # The root of 0 has no derivative, and these samples are 0 whatever they are divided by.
    deviation = variance.masked_fill(variance == 0, 1).sqrt()
    return (z - z.mean(-1, keepdim=True)) / (deviation + EPSILON)


class LogitLoss(Loss):
    """``weight * compare(student, teacher, target)`` of the logits: ``{"loss_<method>"}``.

    The method is the name of the subclass in lower case.

    Args:
        weight: factor of the term.
        temperature: ``T > 0``, divides logits.
        standardize: compare the :func:`standardized_logits` of both models.
    """

    needs_logits = True

    def __init__(self, weight: float, temperature: float, *, standardize: bool = False) -> None:
        super().__init__()
        check_weights(weight=weight)
        check_temperature(temperature)
        self.weight = weight
        self.temperature = temperature
        self.standardize = standardize

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        """The loss of logits ``(B, P)``, a scalar without its weight."""
        raise NotImplementedError

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Tensor]:
        method = type(self).__name__
        teacher = require(teacher, "teacher", method)
        own = require(student.logits, "student.logits", method)
        other = require(teacher.logits, "teacher.logits", method)
        if self.standardize:
            own, other = standardized_logits(own), standardized_logits(other)
        loss = self.compare(own, other, target)
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
