"""DKD: target and non-target knowledge, weighted separately (Zhao et al., CVPR 2022)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import LogitLoss
from pcka.losses.checks import as_classes, as_logits, check_temperature, check_weights
from pcka.losses.numerics import this_or_other, without_target


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    r"""``alpha * TCKD + beta * NCKD``.

    ``TCKD = T^2 * mean KL(b_t || b_s)`` of the two probabilities (target, all others), ``NCKD =
    T^2 * mean KL(q_t || q_s)`` of the softmax over the non-target classes (Zhao et al. 2022,
    equations 6 and 7).

    Args:
        student: ``(B, P)`` logits, any floating dtype.
        teacher: ``(B, P)`` logits; no gradient reaches it.
        target: ``(B,)`` class indices, or ``(B, P)`` class probabilities, whose most likely
            class is used, as in OFA-KD's public code (Hao et al., NeurIPS 2023).
        alpha: factor of the target part.
        beta: factor of the non-target part.
        temperature: ``T > 0``, divides the logits.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: logits that differ in shape or device, targets that do not match the
            batch, or a temperature that is not positive.
    """
    student, teacher = as_logits(student, teacher)
    target = as_classes(student, target)
    check_temperature(temperature)
    logits = [x / temperature for x in (student, teacher)]
    binary = _divergence(*(this_or_other(x, target) for x in logits))
    others = _divergence(*(F.log_softmax(without_target(x, target), dim=1) for x in logits))
    return temperature**2 * (alpha * binary + beta * others)


def _divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


class DKD(LogitLoss):
    """:func:`dkd_loss` as a module: ``{"loss_dkd"}``.

    Args:
        weight: factor of the term.
        standardize: compare the z-scores of both models' logits.
        alpha, beta, temperature: of :func:`dkd_loss`.
    """

    needs_target = True

    def __init__(
        self,
        *,
        weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(weight, temperature, standardize=standardize)
        check_weights(alpha=alpha, beta=beta)
        self.alpha = alpha
        self.beta = beta

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return dkd_loss(
            student,
            teacher,
            self.need(target, "target"),
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
        )
