"""ITRD: correlation and mutual information of representations (Miles et al., BMVC 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from pcka.losses.adapters import PooledLinear, adapt, fit, pooled, prepared
from pcka.losses.base import NO_CONTEXT, Context, Loss, Outputs, Term
from pcka.losses.checks import as_samples, check_temperature, check_weights, unlike
from pcka.losses.numerics import leave_out_constant, unit_length, without_autocast


def itrd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    correlation_weight: float = 2.0,
    mutual_weight: float = 1.0,
    alpha: float = 1.01,
) -> Tensor:
    r"""``w_c * correlation + w_m * mutual information`` of one pair of representations.

    The correlation term is ``log2 sum_j |c_j - 1|^(2 alpha)``, with ``c_j = sum_i z_s[i, j] z_t[i,
    j] / B`` of features standardized over the batch (deviation with ``B - 1``, so its minimum is
    ``log2(D B^(-2 alpha))``, not minus infinity). The mutual information term is ``||G_s||_F^2
    - ||G_st||_F^2`` with ``G`` the cosines between samples and ``G_st = G_s * G_t`` entry by entry,
    each divided by its trace (Miles et al., "Information Theoretic Representation Distillation",
    BMVC 2022; both in the form of the authors' public code, which computes the second
    without the logarithms of Renyi's entropy).

    Args:
        student: ``(B, D)``, adapted to the teacher's width, any floating dtype.
        teacher: ``(B, D)``, same device; no gradient reaches it.
        correlation_weight: ``w_c``.
        mutual_weight: ``w_m``.
        alpha: order of the entropy in the correlation term, above 0.

    Returns:
        A scalar: float32, or float64 for float64 input. A channel that is constant over the batch
        in either model counts as uncorrelated. The correlation of two numbers is 1 or -1: that
        term of two samples is 0 with gradient 0.

    Raises:
        ValueError: features that differ in shape or device, fewer than two samples, or an order
            that is not positive.
    """
    correlation = correlation_loss(student, teacher, alpha=alpha)
    return correlation_weight * correlation + mutual_weight * mutual_loss(student, teacher)


def correlation_loss(student: Tensor, teacher: Tensor, *, alpha: float = 1.01) -> Tensor:
    """The first term of :func:`itrd_loss`, without its weight."""
    check_temperature(alpha, "alpha")
    student, teacher = _as_vectors(student, teacher)
    correlation = (_standardized(student) * _standardized(teacher)).sum(0) / len(student)
    loss = (1 - correlation).abs().pow(2 * alpha).sum().log2()
    return leave_out_constant(
        loss, samples=student.shape[0], up_to=2, level="loss_itrd_correlation"
    )


@without_autocast
def mutual_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The second term of :func:`itrd_loss`, without its weight; any widths."""
    student, teacher = as_samples(student, teacher)
    g_s, g_t = (x @ x.T for x in (unit_length(student, 1), unit_length(teacher, 1)))
    g_s, g_st = (g / g.trace().clamp(min=torch.finfo(g.dtype).eps) for g in (g_s, g_s * g_t))
    return g_s.square().sum() - g_st.square().sum()


def _as_vectors(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student, teacher = as_samples(student, teacher)
    if student.dim() != 2 or student.shape != teacher.shape or len(student) < 2:
        wanted = "features of one shape (B, D) with two samples or more"
        raise unlike(student.shape, teacher.shape, wanted, "Adapt the width with a linear layer")
    return student, teacher


def _standardized(x: Tensor) -> Tensor:
    """Each column with mean 0 and variance 1; 0 where it is constant."""
    variance = x.var(0)
    return (x - x.mean(0)) / variance.masked_fill(variance == 0, 1).sqrt()


class ITRD(Loss):
    """:func:`itrd_loss` at one tap: ``{"loss_itrd_correlation", "loss_itrd_mutual"}``.

    A trained linear layer brings the student's features to the teacher's width. The correlation
    term always uses its output, the mutual information term only if the widths differ, as in the
    authors' public code. Maps are averaged over their positions first.

    Args:
        stage: name of the tapped features, vectors or maps.
        correlation_weight, mutual_weight, alpha: of :func:`itrd_loss`.
    """

    can_be_negative = True  # the logarithm of the correlation term
    relational = True
    least_samples = 2

    def __init__(
        self,
        *,
        stage: str = "pooled",
        correlation_weight: float = 2.0,
        mutual_weight: float = 1.0,
        alpha: float = 1.01,
    ) -> None:
        super().__init__()
        check_weights(correlation_weight=correlation_weight, mutual_weight=mutual_weight)
        check_temperature(alpha, "alpha")
        self.taps = (stage,)
        self.correlation_weight = correlation_weight
        self.mutual_weight = mutual_weight
        self.alpha = alpha
        self.embedding: PooledLinear | None = None

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the linear layer."""
        own = pooled(student.feature(self.taps[0]))
        other = pooled(self.need(teacher, "teacher").feature(self.taps[0]))
        self.embedding = fit(PooledLinear(own.shape[1], other.shape[1]), own)

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """Both terms."""
        teacher = self.need(teacher, "teacher")
        own, other = student.feature(self.taps[0]), pooled(teacher.feature(self.taps[0]))
        embedded = adapt(prepared(self.embedding, "ITRD"), own)
        own = pooled(own)
        compared = own if own.shape == other.shape else embedded
        correlation = correlation_loss(embedded, other, alpha=self.alpha)
        mutual = mutual_loss(compared, other)
        return {
            f"loss_{self.log_name}_correlation": Term(self.correlation_weight, correlation),
            f"loss_{self.log_name}_mutual": Term(self.mutual_weight, mutual),
        }
