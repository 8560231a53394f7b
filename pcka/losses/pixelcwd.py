"""CWD of class scores: match where each class is seen (Shu et al., ICCV 2021)."""

from __future__ import annotations

from torch import Tensor

from pcka.losses.checks import check_temperature
from pcka.losses.cwd import cwd_loss
from pcka.losses.pixelkd import PixelLoss


class PixelCWD(PixelLoss):
    """:func:`pcka.losses.cwd_loss` on the class scores of every pixel: ``{"loss_pixelcwd"}``.

    Args:
        weight: factor of the term; Shu et al. use 3.
        temperature: ``T > 0``, divides the logits; Shu et al. use 4.
    """

    def __init__(self, *, weight: float = 3.0, temperature: float = 4.0) -> None:
        super().__init__(weight)
        check_temperature(temperature)
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cwd_loss(student, teacher, temperature=self.temperature)
