"""Knowledge distillation on softened logits (Hinton, Vinyals and Dean 2015)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import LogitLoss
from pcka.losses.checks import as_logits, check_temperature


def kd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    r"""Divergence of the student's softened class probabilities from the teacher's.

    ``T^2 * mean over samples of KL(softmax(t / T) || softmax(s / T))``; the factor keeps the
    gradient's scale when ``T`` changes (Hinton et al. 2015, section 2).

    Args:
        student: ``(B, P)`` logits, any floating dtype.
        teacher: ``(B, P)`` logits; no gradient reaches it.
        temperature: ``T > 0``, divides the logits.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: logits that differ in shape or device, or are not floating, or a
            temperature that is not positive.
    """
    student, teacher = as_logits(student, teacher)
    check_temperature(temperature)
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


class KD(LogitLoss):
    """:func:`kd_loss` as a module: ``{"loss_kd"}``.

    Args:
        weight: factor of the term.
        temperature: ``T > 0``, divides the logits.
        standardize: compare the z-scores of both models' logits (Sun et al. 2024, with ``weight=9``
            and ``temperature=2``).
    """

    def __init__(
        self, *, weight: float = 1.0, temperature: float = 4.0, standardize: bool = False
    ) -> None:
        super().__init__(weight, temperature, standardize=standardize)

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return kd_loss(student, teacher, temperature=self.temperature)
