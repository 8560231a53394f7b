"""Feature CKA: align the samples of a batch as the teacher's features relate them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcka.losses.base import StagewiseLoss
from pcka.losses.checks import as_samples
from pcka.losses.numerics import leave_out_constant
from pcka.ops import cka


def fcka_loss(
    student: Tensor, teacher: Tensor, *, center: bool = True, level: str = "fcka_loss"
) -> Tensor:
    r"""``1 - CKA`` of the features of a batch, flattened to one row per sample.

    ``1 - CKA(X_s, X_t)`` with ``X = features (B, C*H*W)`` (Zhou et al. 2024, section 4.1). The
    widths of the two models may differ: only the ``B x B`` Gram matrices are compared.

    Args:
        student: ``(B, C_s, H_s, W_s)`` or ``(B, D_s)``, any floating dtype.
        teacher: ``(B, C_t, H_t, W_t)`` or ``(B, D_t)``; no gradient reaches it.
        center: center the Gram matrices.
        level: what the warning of a degenerate batch calls this level.

    Returns:
        A scalar in [0, 1]: float32, or float64 for float64 input. Where the batch makes CKA
        constant (one sample, or two when centered) it is 0 with gradient 0.

    Raises:
        ValueError: features that do not hold the same samples, or differ in device.
    """
    student, teacher = as_samples(student, teacher, widen=False)
    loss = 1 - cka(student.flatten(1), teacher.flatten(1), center=center)
    return leave_out_constant(loss, samples=student.shape[0], center=center, level=level)


class FCKA(StagewiseLoss):
    """:func:`fcka_loss` of several stages: ``{"loss_fcka_<stage>"}``.

    Args:
        stages: names of the tapped features.
        weights: factor of each stage's term, or one of all.
        center: center the Gram matrices.
    """

    relational = True

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("last",),
        weights: float | Sequence[float] = (10.0,),
        center: bool = True,
    ) -> None:
        super().__init__(stages, weights)
        self.center = center

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        level = f"loss_{self.log_name}_{stage}"
        return fcka_loss(student, teacher, center=self.center, level=level)
