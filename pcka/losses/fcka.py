"""Feature CKA: align the samples of a batch as the teacher's features relate them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcka.losses.base import Loss
from pcka.losses.checks import as_stages, as_weights, check_samples, require
from pcka.losses.degenerate import leave_out_constant
from pcka.losses.outputs import Outputs
from pcka.losses.registry import register
from pcka.ops import cka


def fcka_loss(
    student: Tensor, teacher: Tensor, *, center: bool = True, level: str = "fcka_loss"
) -> Tensor:
    r"""``1 - CKA`` of the features of a batch, flattened to one row per sample.

    ``1 - CKA(X_s, X_t)`` with ``X = features (B, C*H*W)`` (Zhou et al. 2024, section 4.1). The
    widths of the two models may differ: only the ``B x B`` Gram matrices are compared.

    Args:
        student: ``(B, C_s, H_s, W_s)`` or ``(B, D_s)``, any floating dtype.
        teacher: ``(B, C_t, H_t, W_t)`` or ``(B, D_t)``, same dtype; no gradient reaches it.
        center: center the Gram matrices.
        level: what the warning of a degenerate batch calls this level.

    Returns:
        A scalar in [0, 1]: float32, or float64 for float64 input. Where the batch makes CKA
        constant (one sample, or two when centered) it is 0 with gradient 0.

    Raises:
        ValueError: features that do not hold the same samples, or differ in dtype or device.
    """
    check_samples(student, teacher)
    loss = 1 - cka(student.flatten(1), teacher.detach().flatten(1), center=center)
    return leave_out_constant(loss, samples=student.shape[0], center=center, level=level)


@register("FCKA")
class FCKA(Loss):
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
        super().__init__()
        self.taps = as_stages(stages)
        self.weights = as_weights(stages, weights)
        self.center = center

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Tensor]:
        teacher = require(teacher, "teacher", "FCKA")
        terms = {}
        for stage, weight in zip(self.taps, self.weights, strict=True):
            name = f"loss_fcka_{stage}"
            features = student.feature(stage), teacher.feature(stage)
            terms[name] = weight * fcka_loss(*features, center=self.center, level=name)
        return terms
