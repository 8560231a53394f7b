"""CWD: match where each channel is active (Shu et al., ICCV 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import StagewiseLoss
from pcka.losses.checks import as_maps, check_temperature


def cwd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Divergence of each channel's distribution over the positions from the teacher's.

    ``T^2 / (B C) * sum KL(softmax(t / T) || softmax(s / T))``, the softmax over ``H * W`` (Shu et
    al. 2021, equations 3 and 4).

    Args:
        student: ``(B, C, H, W)``, any floating dtype.
        teacher: same shape and device; no gradient reaches it.
        temperature: ``T > 0``, divides the activations.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: maps that differ in shape or device, or a temperature that is not positive.
    """
    student, teacher = as_maps(student, teacher)
    check_temperature(temperature)
    log_student = F.log_softmax(student.flatten(2) / temperature, dim=2)
    log_teacher = F.log_softmax(teacher.flatten(2) / temperature, dim=2)
    divergence = F.kl_div(
        log_student.flatten(0, 1), log_teacher.flatten(0, 1), reduction="batchmean", log_target=True
    )
    return temperature**2 * divergence


class CWD(StagewiseLoss):
    """:func:`cwd_loss` for several maps: ``{"loss_cwd_<stage>"}``.

    Args:
        stages: names of the tapped feature maps.
        weights: factor of each stage's term, or a single one for all.
        temperature: ``T > 0``, divides the activations.
    """

    same_shape = True

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("last",),
        weights: float | Sequence[float] = (10.0,),
        temperature: float = 1.0,
    ) -> None:
        super().__init__(stages, weights)
        check_temperature(temperature)
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        return cwd_loss(student, teacher, temperature=self.temperature)
