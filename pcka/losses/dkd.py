"""DKD: target and non-target knowledge weighed apart (Zhao et al., CVPR 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pcka.losses.checks import check_logits, check_target, check_temperature, require
from pcka.losses.logitwise import LogitLoss, without_target
from pcka.losses.registry import register
from pcka.ops.reference import accumulation_dtype


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
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
        target: ``(B,)`` class indices.
        alpha: factor of the target part.
        beta: factor of the non-target part.
        temperature: ``T > 0``, divides the logits.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: logits of different shapes or devices, targets that are no class indices of the
            batch, or a temperature that is not positive.
    """
    check_logits(student, teacher)
    check_target(student, target)
    check_temperature(temperature)
    dtype = accumulation_dtype(student.dtype)
    logits = [x.to(dtype) / temperature for x in (student, teacher.detach())]
    binary = _divergence(*(_target_or_not(x, target) for x in logits))
    others = _divergence(*(_log_softmax_of_others(x, target) for x in logits))
    return temperature**2 * (alpha * binary + beta * others)


def _divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def _target_or_not(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities ``(B, 2)`` of the target and of everything else."""
    others = without_target(logits, target).logsumexp(1, keepdim=True)
    return F.log_softmax(torch.cat([logits.gather(1, target[:, None]), others], dim=1), dim=1)


def _log_softmax_of_others(logits: Tensor, target: Tensor) -> Tensor:
    return F.log_softmax(without_target(logits, target), dim=1)


@register("DKD")
class DKD(LogitLoss):
    """:func:`dkd_loss` as a module: ``{"loss_dkd"}``.

    Args:
        weight: factor of the term.
        alpha: factor of the target part.
        beta: factor of the non-target part.
        temperature: ``T > 0``, divides the logits.
    """

    needs_target = True

    def __init__(
        self,
        *,
        weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(weight, temperature)
        self.alpha = alpha
        self.beta = beta

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        """:func:`dkd_loss`."""
        target = require(target, "target", "DKD")
        return dkd_loss(student, teacher, target, self.alpha, self.beta, self.temperature)
