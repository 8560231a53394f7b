"""PKD: imitate the feature maps' pattern, channel by channel (Cao et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcka.losses.base import StagewiseLoss
from pcka.losses.checks import as_maps
from pcka.losses.numerics import leave_out_constant

EPSILON = 1e-6


def pkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Half the mean squared difference of channel-normalised maps: nearly ``1 - Pearson``.

    ``1/2 mean((n(X_s) - n(X_t))^2)``, ``n(x) = (x - mean) / (std + 1e-6)`` of each channel over
    batch and positions, ``std`` with ``N - 1`` (Cao et al. 2022, equation 2).

    Args:
        student: ``(B, C, H, W)``, any floating dtype.
        teacher: same shape and device; no gradient reaches it.

    Returns:
        A scalar: float32, or float64 for float64 input. Of two values only the order is left when
        they are normalised: for channels of fewer than three, it is 0 with gradient 0.

    Raises:
        ValueError: maps that differ in shape or device.
    """
    student, teacher = as_maps(student, teacher)
    loss = (_normalize(student) - _normalize(teacher)).square().mean() / 2
    values = student[:, 0].numel()
    return leave_out_constant(loss, samples=values, up_to=2, level="pkd_loss")


def _normalize(x: Tensor) -> Tensor:
    rows = x.transpose(0, 1).flatten(1)
    deviation = rows.std(1, keepdim=True, correction=min(1, rows.shape[1] - 1))
    return (rows - rows.mean(1, keepdim=True)) / (deviation + EPSILON)


class PKD(StagewiseLoss):
    """:func:`pkd_loss` for several maps: ``{"loss_pkd_<stage>"}``.

    Args:
        stages: names of the tapped feature maps.
        weights: factor of each stage's term, or a single one for all; Cao et al. use 6 for Faster
            R-CNN and 10 for RetinaNet.
    """

    relational = True
    same_shape = True

    def __init__(
        self, *, stages: Sequence[str] = ("last",), weights: float | Sequence[float] = (10.0,)
    ) -> None:
        super().__init__(stages, weights)

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        return pkd_loss(student, teacher)
