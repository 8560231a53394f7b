"""The parts of both models' heads that the losses of a run read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from detection.dense import DenseParts
from detection.pixels import PixelParts
from detection.regions import RegionParts
from detection.teacher import TeacherDetector
from pcka.engine.config import ConfigError
from pcka.losses import Loss
from pcka.losses.heads import PixelHead, RegionHead

Parts = DenseParts | RegionParts | PixelParts


def read_heads(
    student: nn.Module, teacher: TeacherDetector, losses: Sequence[Loss], *, pixels: bool = False
) -> Parts:
    """Set up the teacher to return what the losses read from its head; return the student's parts.

    Args:
        student: a detectron2 detector or segmenter.
        teacher: its ``parts`` are set.
        losses: losses of the run; at least one reads heads, unless ``pixels`` is set.
        pixels: the losses read the semantic segmentation head as a level.

    Raises:
        ConfigError: the losses cannot read a head, or both heads' outputs differ in meaning.
    """
    reading = [loss for loss in losses if loss.needs_head is not None]
    names = ", ".join([*(type(loss).__name__ for loss in reading), *["the level sem_seg"] * pixels])
    depths = {loss.head_depth for loss in reading}
    kinds = {loss.needs_head for loss in reading} | ({PixelHead} if pixels else set())
    if len(kinds) > 1 or len(depths - {0}) > 1:
        raise ConfigError(f"DISTILL.METHODS: {names} read heads of two kinds or at two depths")
    kind, whose = kinds.pop(), "student"
    try:
        own = _parts(student, kind, reading, predictions=0 in depths)
        whose = "teacher"
        teacher.parts = other = _parts(teacher.detector, kind, reading)
    except ValueError as error:
        raise ConfigError(f"DISTILL.METHODS: {names}: the {whose}: {error}") from error
    encodings = [parts.encoding for parts in (own, other) if isinstance(parts, RegionParts)]
    if len(set(encodings)) > 1:
        raise ConfigError(
            "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS: {} of the student and {} of the teacher: {} "
            "compares values scaled by them; use the teacher's".format(*encodings, names)
        )
    return own


def _parts(
    model: nn.Module, kind: type | None, reading: Sequence[Loss], *, predictions: bool = True
) -> Parts:
    """Return the parts of a model's head that the losses read."""
    if kind is PixelHead:
        return PixelParts(model)
    if kind is RegionHead:
        return RegionParts(model, max(cast(Any, loss).proposals for loss in reading))
    depth = max(loss.head_depth for loss in reading)
    return DenseParts(model, depth, predictions=predictions)
