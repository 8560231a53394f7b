"""Feature maps of two models brought to one size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pcka.ops.reference import accumulation_dtype


def at_one_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps in float32 or better, each side pooled (adaptive average) to the smaller one.

    Args:
        student: ``(B, C_s, H_s, W_s)``.
        teacher: ``(B, C_t, H_t, W_t)``.

    Raises:
        ValueError: features that are no maps.
    """
    if student.dim() != 4 or teacher.dim() != 4:
        raise ValueError(
            "student and teacher must be feature maps (B, C, H, W); got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}. Tap a module before the "
            "pooling"
        )
    height = min(student.shape[2], teacher.shape[2])
    size = (height, min(student.shape[3], teacher.shape[3]))
    return _pooled(student, size), _pooled(teacher, size)


def _pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    x = x.to(accumulation_dtype(x.dtype))
    return x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size)
