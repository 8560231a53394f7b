"""MLKD: predictions aligned by sample, by batch and by class (Jin et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import Loss, Outputs, Term
from pcka.losses.checks import as_logits, check_temperature, check_weights
from pcka.losses.kd import kd_loss
from pcka.losses.numerics import without_autocast

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)


def mlkd_terms(
    student: Tensor, teacher: Tensor, *, temperatures: Sequence[float] = TEMPERATURES
) -> tuple[Tensor, Tensor, Tensor]:
    """The instance, batch and class levels of :func:`mlkd_loss`, without their weights."""
    _check_temperatures(temperatures)
    student, teacher = as_logits(student, teacher)
    levels = torch.zeros(3, dtype=student.dtype, device=student.device)
    for temperature in temperatures:
        p_s, p_t = (F.softmax(x / temperature, dim=1) for x in (student, teacher))
        instance = kd_loss(student, teacher, temperature=temperature)
        levels = levels + torch.stack([instance, _apart(p_s, p_t), _apart(p_s.T, p_t.T)])
    instance, batch, classes = levels
    return instance, batch, classes


def mlkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    instance_weight: float = 0.45,
    batch_weight: float = 0.45,
    class_weight: float = 0.45,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Tensor:
    r"""Alignment of the predictions on three levels, summed over several temperatures.

    ``sum_T w_i T^2 mean KL(p_t || p_s) + w_b ||p_t p_t' - p_s p_s'||_F^2 / B + w_c ||p_t' p_t -
    p_s' p_s||_F^2 / P`` with ``p = softmax(logits / T) (B, P)``: the samples one by one, the Gram
    matrix between samples, and the one between classes (Jin et al., "Multi-Level Logit
    Distillation", CVPR 2023; the factor ``T^2`` of the first level as in the authors'
    public code).

    Args:
        student: ``(B, P)`` logits, any floating dtype.
        teacher: ``(B, P)`` logits; no gradient reaches it.
        instance_weight: ``w_i``.
        batch_weight: ``w_b``.
        class_weight: ``w_c``.
        temperatures: the ``T > 0``, one or more; each divides the logits.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: logits that differ in shape or device, no temperature, or one that is not
            positive.
    """
    levels = mlkd_terms(student, teacher, temperatures=temperatures)
    weights = (instance_weight, batch_weight, class_weight)
    instance, batch, classes = (weight * level for weight, level in zip(weights, levels))
    return instance + batch + classes


@without_autocast
def _apart(x: Tensor, y: Tensor) -> Tensor:
    """``||x x' - y y'||_F^2 / N`` for rows ``(N, D)``."""
    return (x @ x.T - y @ y.T).square().sum() / len(x)


def _check_temperatures(temperatures: Sequence[float]) -> None:
    if isinstance(temperatures, str) or not isinstance(temperatures, Sequence) or not temperatures:
        raise ValueError(
            f"temperatures must be a list of one or more numbers, got {temperatures!r}"
        )
    for temperature in temperatures:
        check_temperature(temperature, "temperatures")


class MLKD(Loss):
    """:func:`mlkd_loss`: ``{"loss_mlkd_instance", "loss_mlkd_batch", "loss_mlkd_class"}``.

    The weights are those that the authors' public code gives to the terms of one view of the
    images: 0.9, of which its confidence mask leaves half. That code also trains on a second,
    strongly augmented view (cross-entropy of both, the instance level of both), so each model runs
    twice per step; this loss compares the views that both models were given.

    Args:
        instance_weight, batch_weight, class_weight, temperatures: of :func:`mlkd_loss`.
    """

    needs_logits = True
    relational = True

    def __init__(
        self,
        *,
        instance_weight: float = 0.45,
        batch_weight: float = 0.45,
        class_weight: float = 0.45,
        temperatures: Sequence[float] = TEMPERATURES,
    ) -> None:
        super().__init__()
        check_weights(
            instance_weight=instance_weight, batch_weight=batch_weight, class_weight=class_weight
        )
        _check_temperatures(temperatures)
        self.level_weights = {
            "instance": instance_weight, "batch": batch_weight, "class": class_weight
        }  # fmt: skip
        self.temperatures = tuple(temperatures)

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """The three levels."""
        levels = mlkd_terms(
            self.need(student.logits, "student.logits"),
            self.need(self.need(teacher, "teacher").logits, "teacher.logits"),
            temperatures=self.temperatures,
        )
        return {
            f"loss_{self.log_name}_{name}": Term(weight, level)
            for (name, weight), level in zip(self.level_weights.items(), levels, strict=True)
        }
