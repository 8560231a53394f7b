"""RCKA: feature CKA and logit CKA together (Zhou et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcka.losses.base import Loss, Outputs, Term
from pcka.losses.checks import as_stages, as_weights
from pcka.losses.fcka import FCKA, fcka_loss
from pcka.losses.lcka import LCKA, lcka_loss


def rcka_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    feature_weight: float = 10.0,
    intra_weight: float = 15.0,
    inter_weight: float = 15.0,
    temperature: float | None = None,
    center: bool = True,
    row_normalize: bool = False,
) -> Tensor:
    r"""The distillation part of RCKA for one stage; cross-entropy is separate.

    ``w_f (1 - FCKA) + w_intra (1 - intra) + w_inter (1 - inter)`` (Zhou et al. 2024, section 4.1):
    :func:`fcka_loss` of the features plus :func:`lcka_loss` of the logits.

    Args:
        student_features: ``(B, C_s, H_s, W_s)`` or ``(B, D_s)``, any floating dtype.
        teacher_features: ``(B, C_t, H_t, W_t)`` or ``(B, D_t)``; no gradient reaches it.
        student_logits: ``(B, P)``.
        teacher_logits: ``(B, P)``; no gradient reaches it.
        feature_weight: factor ``w_f`` of the feature term.
        intra_weight, inter_weight, temperature, row_normalize: of :func:`lcka_loss`.
        center: center all Gram matrices.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: as :func:`fcka_loss` and :func:`lcka_loss`.
    """
    features = fcka_loss(student_features, teacher_features, center=center)
    logits = lcka_loss(
        student_logits,
        teacher_logits,
        intra_weight=intra_weight,
        inter_weight=inter_weight,
        temperature=temperature,
        center=center,
        row_normalize=row_normalize,
    )
    return feature_weight * features + logits


class RCKA(Loss):
    """The terms of :class:`FCKA` and :class:`LCKA`; cross-entropy is the separate loss ``CE``.

    Args:
        stages: names of the tapped features.
        feature_weights: factor of each stage's term, or a single one for all.
        intra_weight, inter_weight, temperature, row_normalize: of :func:`lcka_loss`.
        center: center all Gram matrices.
    """

    needs_logits = True
    relational = True

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("last",),
        feature_weights: float | Sequence[float] = (10.0,),
        intra_weight: float = 15.0,
        inter_weight: float = 15.0,
        temperature: float | None = None,
        center: bool = True,
        row_normalize: bool = False,
    ) -> None:
        super().__init__()
        weights = as_weights(as_stages(stages), feature_weights, "feature_weights")
        self.feature_loss = FCKA(stages=stages, weights=weights, center=center)
        self.logit_loss = LCKA(
            intra_weight=intra_weight,
            inter_weight=inter_weight,
            temperature=temperature,
            center=center,
            row_normalize=row_normalize,
        )
        self.taps = self.feature_loss.taps

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """The terms of both parts."""
        given = student, teacher, target
        return {**self.feature_loss.terms(*given), **self.logit_loss.terms(*given)}
