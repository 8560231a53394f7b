"""FitNet: imitate the teacher's features value by value (Romero et al., ICLR 2015)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcka.losses.checks import check_maps
from pcka.losses.registry import register
from pcka.losses.stagewise import StagewiseLoss
from pcka.ops.reference import accumulation_dtype


def fitnet_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference of two feature maps, ``mean((X_s - X_t)^2)``.

    Romero et al. 2015, equation 3; a regressor between unlike widths is the caller's.

    Args:
        student: ``(B, C, H, W)``, any floating dtype.
        teacher: same shape and device; no gradient reaches it.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: maps of different shapes or devices.
    """
    check_maps(student, teacher)
    dtype = accumulation_dtype(student.dtype)
    return (student.to(dtype) - teacher.detach().to(dtype)).square().mean()


@register("FITNET")
class FITNET(StagewiseLoss):
    """:func:`fitnet_loss` of several maps: ``{"loss_fitnet_<stage>"}``.

    Args:
        stages: names of the tapped feature maps.
        weights: factor of each stage's term.
    """

    def __init__(
        self, *, stages: Sequence[str] = ("stage3",), weights: Sequence[float] = (100.0,)
    ) -> None:
        super().__init__(stages, weights)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """:func:`fitnet_loss`."""
        return fitnet_loss(student, teacher)
