"""NKD: normalised knowledge of the non-target classes (Yang et al., ICCV 2023)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import LogitLoss
from pcka.losses.checks import as_classes, as_logits, check_temperature, check_weights
from pcka.losses.numerics import without_target


def nkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> Tensor:
    r"""Cross-entropies of the target and of the normalised other classes, without the task loss.

    ``-mean(p_t[target] log p_s[target]) - gamma T^2 mean_i sum_j q_t log q_s``, ``p`` the softmax
    of all classes and ``q`` that of the others at temperature ``T`` (Yang et al. 2023, equation 9).

    Args:
        student: ``(B, P)`` logits, any floating dtype.
        teacher: ``(B, P)`` logits; no gradient reaches it.
        target: ``(B,)`` class indices, or ``(B, P)`` class probabilities, whose most likely
            class is used, as in the authors' public code.
        gamma: factor of the non-target part.
        temperature: ``T > 0``, divides the logits of the other classes.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: logits that differ in shape or device, targets that do not match the
            batch, or a temperature that is not positive.
    """
    student, teacher = as_logits(student, teacher)
    target = as_classes(student, target)
    check_temperature(temperature)
    own = target[:, None]
    of_target = F.softmax(teacher, dim=1).gather(1, own) * F.log_softmax(student, dim=1).gather(
        1, own
    )
    q_s, q_t = (without_target(x, target) / temperature for x in (student, teacher))
    of_others = (F.softmax(q_t, dim=1) * F.log_softmax(q_s, dim=1)).sum(1)
    return -of_target.mean() - gamma * temperature**2 * of_others.mean()


class NKD(LogitLoss):
    """:func:`nkd_loss` as a module: ``{"loss_nkd"}``.

    Args:
        weight: factor of the term.
        standardize: compare the z-scores of both models' logits.
        gamma, temperature: of :func:`nkd_loss`.
    """

    needs_target = True

    def __init__(
        self,
        *,
        weight: float = 1.0,
        gamma: float = 1.5,
        temperature: float = 1.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(weight, temperature, standardize=standardize)
        check_weights(gamma=gamma)
        self.gamma = gamma

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        target = self.need(target, "target")
        return nkd_loss(student, teacher, target, gamma=self.gamma, temperature=self.temperature)
