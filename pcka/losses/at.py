"""AT: attend to the positions that the teacher attends to (Zagoruyko and Komodakis, ICLR 2017)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcka.losses.base import StagewiseLoss
from pcka.losses.checks import as_samples, check_temperature
from pcka.losses.numerics import at_one_size, unit_length


def at_loss(student: Tensor, teacher: Tensor, *, p: float = 2) -> Tensor:
    r"""Mean squared difference of normalised attention maps.

    ``mean((Q_s - Q_t)^2)``, ``Q = F / ||F||_2`` for each sample with ``F = mean over channels of
    |x|^p``, flattened (Zagoruyko and Komodakis 2017, equation 2). The larger map is pooled
    (adaptive average) to the size of the smaller one.

    Args:
        student: ``(B, C_s, H_s, W_s)``, any floating dtype.
        teacher: ``(B, C_t, H_t, W_t)``, same device; no gradient reaches it.
        p: power of the activations, above 0.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: features that are not maps, or differ in batch size.
    """
    student, teacher = at_one_size(*as_samples(student, teacher))
    difference = _attention(student, p) - _attention(teacher, p)
    return difference.square().mean()


def _attention(x: Tensor, p: float) -> Tensor:
    return unit_length(x.abs().pow(p).mean(1).flatten(1), dim=1)


class AT(StagewiseLoss):
    """:func:`at_loss` for several stages: ``{"loss_at_<stage>"}``.

    Args:
        stages: names of the tapped features.
        weights: factor of each stage's term, or a single one for all.
        p: power of the activations.
    """

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("stage1", "stage2", "stage3"),
        weights: float | Sequence[float] = (1000.0, 1000.0, 1000.0),
        p: float = 2.0,
    ) -> None:
        super().__init__(stages, weights)
        check_temperature(p, "p")
        self.p = p

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        return at_loss(student, teacher, p=self.p)
