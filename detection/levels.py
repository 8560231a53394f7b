"""Which feature map of the teacher stands beside which one of the student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from detectron2.layers import ShapeSpec
from torch import Tensor
from torch.nn import functional as F

from pcka.engine.config import ConfigError

DEFAULT_LEVELS = 4
ENOUGH_PATCHES = 16


def match_levels(
    wanted: Sequence[str], student: Mapping[str, ShapeSpec], teacher: Mapping[str, ShapeSpec]
) -> dict[str, str]:
    """Return student level -> teacher level.

    Args:
        wanted: ``"p3"`` (the same name in both) or ``"p3:p2"`` (student, teacher); empty means the
            student's first four levels, from fine to coarse.
        student: what the student's backbone gives, by level.
        teacher: what the teacher's backbone gives, by level.

    Raises:
        ConfigError: a level that a backbone does not have, or one of the student named twice.
    """
    if not wanted:
        wanted = sorted(student, key=lambda level: student[level].stride or 0)[:DEFAULT_LEVELS]
    pairs: dict[str, str] = {}
    for entry in wanted:
        if not isinstance(entry, str):
            raise ConfigError(
                f"DISTILL.LEVELS: expected names like 'p3' or 'p3:p2', got {entry!r} in {wanted}"
            )
        own, _, other = entry.partition(":")
        other = other or own
        for role, level, known in (("student", own, student), ("teacher", other, teacher)):
            if level not in known:
                raise ConfigError(
                    f"DISTILL.LEVELS: {entry!r} names the level {level!r}, which the {role}'s "
                    f"backbone does not have; it gives {_describe(known)}. Write a pair as "
                    "'student:teacher'"
                )
        if own in pairs:
            raise ConfigError(f"DISTILL.LEVELS: the student's {own!r} stands twice in {wanted}")
        pairs[own] = other
    return pairs


def match_map(
    teacher: Tensor, canvas: tuple[int, int], stride: int, size: tuple[int, ...]
) -> Tensor:
    """Return the teacher's map of the student's image area, at the student's size.

    The models may pad a batch to different sizes, always on the right and below: what lies beyond
    the student's canvas is cut off. A map of another resolution is resized bilinearly.

    Args:
        teacher: ``(B, C, H_t, W_t)``.
        canvas: height and width of the student's padded images, pixels.
        stride: of the teacher's map, pixels.
        size: ``(H_s, W_s)`` of the student's map.
    """
    rows, columns = (math.ceil(side / stride) for side in canvas)
    teacher = teacher[:, :, :rows, :columns]
    if tuple(teacher.shape[-2:]) != tuple(size):
        teacher = F.interpolate(teacher, size, mode="bilinear", align_corners=False)
    return teacher


def patches(side: int, stride: int, patch: int | tuple[int, int]) -> int:
    """Number of patches of a square image's feature map; ``side`` in pixels of the image."""
    height, width = (patch, patch) if isinstance(patch, int) else patch
    own = math.ceil(side / stride)
    return math.ceil(own / height) * math.ceil(own / width)


def patch_for(side: int, stride: int) -> int:
    """The largest power of two that leaves ``ENOUGH_PATCHES`` patches, or 1."""
    sizes = [2**power for power in range(7, -1, -1)]
    return next((p for p in sizes if patches(side, stride, p) >= ENOUGH_PATCHES), 1)


def _describe(levels: Mapping[str, ShapeSpec]) -> str:
    return ", ".join(f"{level} (stride {shape.stride})" for level, shape in levels.items())
