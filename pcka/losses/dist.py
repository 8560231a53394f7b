"""DIST: correlate with the teacher's predictions (Huang et al., NeurIPS 2022)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import LogitLoss
from pcka.losses.checks import as_logits, check_temperature, check_weights
from pcka.losses.numerics import leave_out_constant

EPSILON = 1e-8


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 4.0,
) -> Tensor:
    r"""``T^2 * (beta * (1 - mean r(rows)) + gamma * (1 - mean r(columns)))``.

    ``r`` is Pearson's correlation, between classes (rows: the inter-class relation) and between
    samples (columns: the intra-class one) of ``softmax(logits / T)`` (Huang et al. 2022, equations
    8 to 10).

    Args:
        student: ``(B, P)`` logits, any floating dtype.
        teacher: ``(B, P)`` logits; no gradient reaches it.
        beta: factor of the relation within a sample.
        gamma: factor of the relation within a class.
        temperature: ``T > 0``, divides the logits.

    Returns:
        A scalar: float32, or float64 for float64 input. The correlation of two numbers is 1 or -1:
        a relation between fewer than three classes, or samples, is 0 with gradient 0.

    Raises:
        ValueError: logits that differ in shape or device, or a temperature that is not positive.
    """
    student, teacher = as_logits(student, teacher)
    check_temperature(temperature)
    p_s, p_t = (F.softmax(x / temperature, dim=1) for x in (student, teacher))
    inter = _uncorrelated(p_s, p_t, "dist_loss between classes")
    intra = _uncorrelated(p_s.T, p_t.T, "dist_loss between samples")
    return temperature**2 * (beta * inter + gamma * intra)


def _uncorrelated(x: Tensor, y: Tensor, level: str) -> Tensor:
    """``1 - mean r`` of the rows; ``r`` is 0 where a row is constant."""
    x, y = (rows - rows.mean(1, keepdim=True) for rows in (x, y))
    correlation = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + EPSILON)
    loss = 1 - correlation.mean()
    return leave_out_constant(loss, samples=x.shape[1], up_to=2, level=level)


class DIST(LogitLoss):
    """:func:`dist_loss` as a module: ``{"loss_dist"}``.

    Args:
        weight: factor of the term.
        beta, gamma, temperature: of :func:`dist_loss`.
    """

    relational = True

    def __init__(
        self,
        *,
        weight: float = 2.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(weight, temperature)
        check_weights(beta=beta, gamma=gamma)
        self.beta = beta
        self.gamma = gamma

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return dist_loss(
            student, teacher, beta=self.beta, gamma=self.gamma, temperature=self.temperature
        )
