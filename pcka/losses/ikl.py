"""IKL: the two parts of KL divergence, weighted separately (Cui et al., NeurIPS 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import LogitLoss
from pcka.losses.checks import as_logits, check_temperature, check_weights


def ikl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 4.0,
    temperature: float = 4.0,
    weight_temperature: float = 100.0,
) -> Tensor:
    r"""``alpha * soft cross-entropy + beta * weighted mean squared error`` of the logits.

    ``mean_i( -alpha sum_j p_ij log q_ij + beta/4 sum_jk w_ij w_ik (t_ij - t_ik - s_ij + s_ik)^2 )``
    with ``p, q = softmax(t / T), softmax(s / T)`` and ``w = softmax(t / T_2)``. This is IKL-KD as
    its authors trained it on CIFAR-100 (Cui et al. 2024, section 3, and public code): the
    cross-entropy has no factor ``T^2``, the gradient of the second part reaches the student, and
    the weights are per sample. Their means over a class, an option in the authors' code, hardly
    differ at ``T_2 = 100``, where ``w`` is nearly uniform. A logit of minus infinity in either
    model excludes its class from both parts.

    Args:
        student: ``s (B, P)`` logits, any floating dtype.
        teacher: ``t (B, P)`` logits; no gradient reaches it.
        alpha: factor of the cross-entropy.
        beta: factor of the weighted mean squared error.
        temperature: ``T > 0``, divides the logits of the cross-entropy.
        weight_temperature: ``T_2 > 0``, divides the logits of the weights.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: logits that differ in shape or device, or a temperature that is not positive.
    """
    student, teacher = as_logits(student, teacher)
    check_temperature(temperature)
    check_temperature(weight_temperature)
    masked = student.isneginf() | teacher.isneginf()
    student, teacher = (x.masked_fill(masked, torch.finfo(x.dtype).min) for x in (student, teacher))
    cross_entropy = F.cross_entropy(student / temperature, F.softmax(teacher / temperature, dim=1))
    w = F.softmax(teacher / weight_temperature, dim=1)
    difference = (teacher - student).masked_fill(masked, 0)
    # Since sum w = 1, the sum over pairs is twice the variance of the differences under w.
    centered = difference - (w * difference).sum(1, keepdim=True)
    square_error = (w * centered.square()).sum(1).mean() / 2
    return alpha * cross_entropy + beta * square_error


class IKL(LogitLoss):
    """:func:`ikl_loss` as a module: ``{"loss_ikl"}``; cross-entropy with labels is separate.

    Args:
        weight: factor of the term.
        alpha, beta, temperature, weight_temperature: of :func:`ikl_loss`.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 4.0,
        temperature: float = 4.0,
        weight_temperature: float = 100.0,
    ) -> None:
        super().__init__(weight, temperature)
        check_temperature(weight_temperature)
        check_weights(alpha=alpha, beta=beta)
        self.alpha = alpha
        self.beta = beta
        self.weight_temperature = weight_temperature

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return ikl_loss(
            student,
            teacher,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            weight_temperature=self.weight_temperature,
        )
