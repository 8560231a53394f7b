"""Refusals that several losses share, in one wording."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def require(value: T | None, argument: str, loss: str) -> T:
    """``value``, or a ``ValueError`` that says which loss misses which argument."""
    if value is None:
        raise ValueError(f"{argument}: {loss} needs it, got None; pass it, or leave the loss out")
    return value


def _check_comparable(student: Tensor, teacher: Tensor) -> None:
    """Refuse integers, and models on two devices."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, got {tensor.dtype}")
    if student.device != teacher.device:
        raise ValueError(
            "student and teacher must be on one device; got student on "
            f"{student.device} and teacher on {teacher.device}. Move one with .to(device)"
        )


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Refuse logits that are not ``(B, P)`` in both models, floating and on one device."""
    _check_comparable(student, teacher)
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            "student and teacher must be logits of one shape (B, P); got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}. Both models need the "
            "same classes in the same order"
        )


def check_target(logits: Tensor, target: Tensor) -> None:
    """Refuse targets that are not one class index for each row of the logits."""
    if target.dim() != 1 or len(target) != len(logits) or target.is_floating_point():
        raise ValueError(
            f"target must hold a class index for each of the {len(logits)} samples, (B,) int64; "
            f"got {tuple(target.shape)} {target.dtype}"
        )


def check_samples(student: Tensor, teacher: Tensor) -> None:
    """Refuse features that do not hold the same samples, in one dtype and on one device."""
    _check_comparable(student, teacher)
    if student.dtype != teacher.dtype:
        raise ValueError(
            "student and teacher must be features of one dtype; got student "
            f"{student.dtype} and teacher {teacher.dtype}. Convert one, or run both under autocast"
        )
    if student.dim() < 2 or teacher.dim() < 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            "student and teacher must be features of the same samples, (B, ...) each; got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}. Feed both models the "
            "same batch"
        )


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Refuse feature maps that are not ``(B, C, H, W)`` of one shape, floating, on one device."""
    _check_comparable(student, teacher)
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(
            "student and teacher must be feature maps of one shape (B, C, H, W); got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}. Adapt the width by a 1x1 "
            "convolution and the size by resizing"
        )


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")


def check_levels(stages: Sequence[str], **settings: Sized) -> None:
    """Refuse a stage named twice, and settings that do not hold one value for each stage."""
    if len(set(stages)) != len(stages):
        raise ValueError(f"stages must name each stage once, got {stages}")
    for name, values in settings.items():
        if len(values) != len(stages):
            raise ValueError(
                f"{name} must hold one value for each of the {len(stages)} stages {stages}; "
                f"got {len(values)}: {values}"
            )
