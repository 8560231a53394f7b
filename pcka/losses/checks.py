"""Argument checks of the losses: comparable tensors of both models, and uniform errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pcka.ops.reference import accumulation_dtype

T = TypeVar("T")

WHERE_MAPS_ARE = "Tap a module before the pooling; ':map' after its path reads tokens as a map"


def as_logits(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both models' logits, ready to be compared (:func:`ready`).

    Raises:
        ValueError: they are not floating, of one shape ``(B, P)`` and on the same device.
    """
    _check_comparable(student, teacher)
    if student.dim() != 2 or student.shape != teacher.shape:
        way_out = "Both models need the same classes in the same order"
        raise unlike(student.shape, teacher.shape, "logits of one shape (B, P)", way_out)
    return ready(student, teacher)


def as_samples(student: Tensor, teacher: Tensor, *, widen: bool = True) -> tuple[Tensor, Tensor]:
    """Both models' features of the same samples, ready to be compared (:func:`ready`).

    Raises:
        ValueError: they differ in batch size or device, or are not floating.
    """
    _check_comparable(student, teacher)
    if student.dim() < 2 or teacher.dim() < 2 or student.shape[0] != teacher.shape[0]:
        wanted = "features of the same samples, (B, ...) each"
        raise unlike(student.shape, teacher.shape, wanted, "Feed both models the same batch")
    return ready(student, teacher, widen=widen)


def as_maps(student: Tensor, teacher: Tensor, *, widen: bool = True) -> tuple[Tensor, Tensor]:
    """Both models' feature maps of one shape, ready to be compared (:func:`ready`).

    Raises:
        ValueError: they are not floating, of one shape ``(B, C, H, W)`` and on the same device.
    """
    _check_comparable(student, teacher)
    if student.dim() != 4 or student.shape != teacher.shape:
        wanted = "feature maps of one shape (B, C, H, W)"
        way_out = "Adapt the width with a 1x1 convolution and the size by resizing"
        raise unlike(student.shape, teacher.shape, wanted, way_out)
    return ready(student, teacher, widen=widen)


def as_maps_of_one_width(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both models' feature maps of equal width and any size, ready to be compared.

    Raises:
        ValueError: they are not maps, or differ in batch size or channels.
    """
    student, teacher = as_samples(student, teacher)
    if student.dim() != 4 or teacher.dim() != 4 or student.shape[1] != teacher.shape[1]:
        wanted = "feature maps (B, C, H, W) of the same C"
        way_out = (
            f"{WHERE_MAPS_ARE}; Distiller.prepare makes the 1x1 convolution that adapts the width"
        )
        raise unlike(student.shape, teacher.shape, wanted, way_out)
    return student, teacher


def unlike(student: Sequence[int], teacher: Sequence[int], wanted: str, way_out: str) -> ValueError:
    """The error that states what both models' tensors must be, and which shapes they have."""
    return ValueError(
        f"student and teacher must be {wanted}; got student {tuple(student)} and teacher "
        f"{tuple(teacher)}. {way_out}"
    )


def ready(student: Tensor, teacher: Tensor, *, widen: bool = True) -> tuple[Tensor, Tensor]:
    """Both tensors in the same dtype, the teacher's detached.

    Args:
        student: of any floating dtype.
        teacher: likewise.
        widen: convert to float32, or to float64 if either is; False converts to the wider of the
            two dtypes, for operators that widen by themselves.
    """
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    if widen:
        dtype = accumulation_dtype(dtype)
    return student.to(dtype), teacher.detach().to(dtype)


def _check_comparable(student: Tensor, teacher: Tensor) -> None:
    """Reject integer, empty or non-dense tensors, and tensors on different devices."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be dense, got {tensor.layout}; pass {name}.to_dense()")
        if tensor.numel() == 0:
            raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must have a floating dtype, got {tensor.dtype}")
    if student.device != teacher.device:
        raise ValueError(
            "student and teacher must be on one device; got student on "
            f"{student.device} and teacher on {teacher.device}. Move one with .to(device)"
        )


def as_classes(logits: Tensor, target: Tensor) -> Tensor:
    """The target class of each row, ``(B,)``; for probabilities ``(B, P)``, the most likely one.

    Raises:
        ValueError: targets that are neither classes nor probabilities.
    """
    if target.shape == logits.shape and target.is_floating_point():
        return target.argmax(1)
    if target.dim() != 1 or len(target) != len(logits) or target.is_floating_point():
        raise ValueError(
            f"target must hold a class index for each of the {len(logits)} samples, (B,) int64, or "
            f"class probabilities (B, P); got {tuple(target.shape)} {target.dtype}"
        )
    return target


def check_channels(maps: Tensor, **values: Tensor) -> None:
    """Reject values that do not have one entry per channel of the maps, ``(C,)``."""
    for name, value in values.items():
        if value.shape != maps.shape[1:2]:
            raise ValueError(
                f"{name} must hold one value for each of the {maps.shape[1]} channels, got "
                f"{tuple(value.shape)}"
            )


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Reject a temperature, or other divisor or power, that is not positive and finite."""
    if not (_is_number(temperature) and 0 < temperature < math.inf):
        raise ValueError(f"{name} must be positive and finite, got {temperature!r}")


def check_weights(**weights: float) -> None:
    """Reject factors that are negative (which would maximise the term) or not finite numbers."""
    for name, weight in weights.items():
        if not (_is_number(weight) and 0 <= weight < math.inf):
            raise ValueError(f"{name} must be finite and at least 0, got {weight!r}")


def check_counts(**counts: int) -> None:
    """Reject numbers of things that are not integers of at least 1."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")


def as_stages(stages: Sequence[str]) -> tuple[str, ...]:
    """The names of a loss's stages, as a tuple.

    Raises:
        ValueError: no stage, or as :func:`as_names`.
    """
    stages = as_names("stages", stages)
    if not stages:
        raise ValueError("stages is empty; name tapped features, or leave the loss out")
    return stages


def as_names(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """A setting that is a list of different names, as a tuple.

    Raises:
        ValueError: a string instead of a list, anything but names in it, or a name twice.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list of names, got {values!r}; write [{values!r}]")
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} must be names, got {list(values)}")
    if len(set(values)) != len(values):
        raise ValueError(f"{name} must hold each name once, got {list(values)}")
    return tuple(values)


def for_each(stages: Sequence[str], name: str, values: T | Sequence[T]) -> tuple[T, ...]:
    """The setting ``name``, one value per stage; a single one, bare or in a list, serves all.

    Raises:
        ValueError: a sequence of another length, or a string.
    """
    if not isinstance(values, Sequence):
        return (values,) * len(stages)
    if isinstance(values, str) or len(values) not in (1, len(stages)):
        raise ValueError(
            f"{name} must hold one value for each of the {len(stages)} stages "
            f"{', '.join(stages)}, or be a single number; got {values!r}"
        )
    return tuple(values) * (len(stages) if len(values) == 1 else 1)


def as_weights(
    stages: Sequence[str], weights: float | Sequence[float], name: str = "weights"
) -> tuple[float, ...]:
    """The factor of each stage's term, checked by :func:`for_each` and :func:`check_weights`."""
    each = for_each(stages, name, weights)
    for weight in each:
        check_weights(**{name: weight})
    return each


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
