"""CC: keep the correlations between samples (Peng et al., ICCV 2019)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcka.losses.checks import check_samples
from pcka.losses.registry import register
from pcka.losses.stagewise import StagewiseLoss
from pcka.ops.reference import accumulation_dtype


def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""``||T T^T - S S^T||_F / B^2``: the bilinear form of the correlations.

    Peng et al. 2019, equations 5 and 7, without their kernel's Taylor series.

    Args:
        student: ``(B, ...)``, flattened to ``(B, D)``, any floating dtype.
        teacher: ``(B, ...)`` of the same samples, dtype and device; no gradient reaches it.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: features that do not hold the same samples.
    """
    check_samples(student, teacher)
    dtype = accumulation_dtype(student.dtype)
    s, t = (x.to(dtype).flatten(1) for x in (student, teacher.detach()))
    return (t @ t.T - s @ s.T).norm() / student.shape[0] ** 2


@register("CC")
class CC(StagewiseLoss):
    """:func:`cc_loss` of several stages: ``{"loss_cc_<stage>"}``.

    Args:
        stages: names of the tapped features.
        weights: factor of each stage's term.
    """

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("pooled",),
        weights: Sequence[float] = (0.02,),
    ) -> None:
        super().__init__(stages, weights)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """:func:`cc_loss`."""
        return cc_loss(student, teacher)
