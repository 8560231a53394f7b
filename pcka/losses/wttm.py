"""WTTM: match a power-softened teacher, more where it is softer (Zheng and Yang, ICLR 2024)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import LogitLoss
from pcka.losses.checks import as_logits, check_temperature


def wttm_loss(student: Tensor, teacher: Tensor, *, gamma: float = 0.2) -> Tensor:
    r"""Weighted divergence of the student's probabilities from the teacher's, power-transformed.

    ``mean_i U_i KL(p_t^gamma / U_i || p_s)`` with ``p = softmax(logits)`` and ``U_i = sum_j
    p_t[i, j]^gamma``, which is larger the softer the teacher's prediction for the sample is (Zheng
    and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024, and the
    authors' public code). The transformed teacher is the teacher at temperature ``1 / gamma``; the
    student has no temperature.

    Args:
        student: ``(B, P)`` logits, any floating dtype.
        teacher: ``(B, P)`` logits; no gradient reaches it.
        gamma: power of the teacher's probabilities, above 0; below 1 it softens them.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: logits that differ in shape or device, or a power that is not positive.
    """
    student, teacher = as_logits(student, teacher)
    check_temperature(gamma, "gamma")
    softness = (gamma * F.log_softmax(teacher, dim=1)).exp().sum(1)
    transformed = F.log_softmax(gamma * teacher, dim=1)
    log_student = F.log_softmax(student, dim=1)
    divergence = F.kl_div(log_student, transformed, reduction="none", log_target=True).sum(1)
    return (softness * divergence).mean()


class WTTM(LogitLoss):
    """:func:`wttm_loss` as a module: ``{"loss_wttm"}``; cross-entropy with labels is separate.

    Args:
        weight: factor of the term.
        gamma: power of the teacher's probabilities, above 0.
    """

    def __init__(self, *, weight: float = 4.0, gamma: float = 0.2) -> None:
        check_temperature(gamma, "gamma")
        super().__init__(weight, temperature=1 / gamma)
        self.gamma = gamma

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return wttm_loss(student, teacher, gamma=self.gamma)
