"""RLD: a teacher's logits refined by the label (Sun et al., ICCV 2025)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import LogitLoss
from pcka.losses.checks import as_classes, as_logits, check_temperature, check_weights
from pcka.losses.numerics import this_or_other


def rld_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    confidence_temperature: float = 1.0,
) -> Tensor:
    r"""``alpha * sample confidence + beta * masked correlation``.

    The sample confidence ``T_c^2 * mean KL(b_t || b_s)`` compares two probabilities at the
    temperature ``T_c``: ``b_t`` of the teacher's top class and of all others, ``b_s`` of the target
    and of all others. The student becomes as confident in the label as the teacher is in its
    choice, right or wrong. The masked correlation ``T^2 * mean KL(q_t || q_s)`` compares the
    softmax over the classes to which the teacher gives a lower logit than to the target; classes
    that it ranks as high or higher are left out of both models (Sun et al., "Knowledge Distillation
    with Refined Logits", ICCV 2025, and the authors' public code). Where the teacher ranks the
    target last, no class is left, and this part is 0.

    Args:
        student: ``(B, P)`` logits, any floating dtype.
        teacher: ``(B, P)`` logits; no gradient reaches it.
        target: ``(B,)`` class indices, or ``(B, P)`` class probabilities, whose most likely
            class is used, as in :func:`pcka.losses.dkd_loss`.
        alpha: factor of the sample confidence.
        beta: factor of the masked correlation.
        temperature: ``T > 0``, divides the logits of the masked correlation.
        confidence_temperature: ``T_c > 0``, divides those of the sample confidence.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: logits that differ in shape or device, targets that do not match the
            batch, or a temperature that is not positive.
    """
    student, teacher = as_logits(student, teacher)
    target = as_classes(student, target)
    check_temperature(temperature)
    check_temperature(confidence_temperature, "confidence_temperature")
    confidence = _divergence(
        this_or_other(student / confidence_temperature, target),
        this_or_other(teacher / confidence_temperature, teacher.argmax(1)),
    )
    as_high = teacher >= teacher.gather(1, target[:, None])
    # Not minus infinity: a sample with every class masked then has equal logits, not NaN.
    lowest = torch.finfo(student.dtype).min
    below = [(x / temperature).masked_fill(as_high, lowest) for x in (student, teacher)]
    correlation = _divergence(*(F.log_softmax(x, dim=1) for x in below))
    return alpha * confidence_temperature**2 * confidence + beta * temperature**2 * correlation


def _divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


class RLD(LogitLoss):
    """:func:`rld_loss` as a module: ``{"loss_rld"}``; cross-entropy with labels is separate.

    Args:
        weight: factor of the term.
        standardize: compare the z-scores of both models' logits.
        alpha, beta, temperature, confidence_temperature: of :func:`rld_loss`.
    """

    needs_target = True

    def __init__(
        self,
        *,
        weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        confidence_temperature: float = 1.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(weight, temperature, standardize=standardize)
        check_weights(alpha=alpha, beta=beta)
        check_temperature(confidence_temperature, "confidence_temperature")
        self.alpha = alpha
        self.beta = beta
        self.confidence_temperature = confidence_temperature

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return rld_loss(
            student,
            teacher,
            self.need(target, "target"),
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            confidence_temperature=self.confidence_temperature,
        )
