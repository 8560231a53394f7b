"""Which parts of both models' heads the losses of a run read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from detection.dense import DenseParts
from detection.regions import RegionParts
from detection.teacher import TeacherDetector
from pcka.engine.config import ConfigError
from pcka.losses import Loss
from pcka.losses.heads import RegionHead


def read_heads(
    student: nn.Module, teacher: TeacherDetector, losses: Sequence[Loss]
) -> DenseParts | RegionParts:
    """Let the teacher give what the losses read of its head; return what gives the student's.

    Args:
        student: a detectron2 detector.
        teacher: its ``parts`` are set.
        losses: one of them or more read heads.

    Raises:
        ConfigError: heads that the losses cannot read, or that say things of two meanings.
    """
    reading = [loss for loss in losses if loss.needs_head is not None]
    names = ", ".join(type(loss).__name__ for loss in reading)
    depths = {loss.head_depth for loss in reading}
    if len({loss.needs_head for loss in reading}) > 1 or len(depths - {0}) > 1:
        raise ConfigError(f"DISTILL.METHODS: {names} read heads of two kinds or at two depths")
    whose = "student"
    try:
        own = _parts(student, reading, predictions=0 in depths)
        whose = "teacher"
        teacher.parts = other = _parts(teacher.detector, reading)
    except ValueError as error:
        raise ConfigError(f"DISTILL.METHODS: {names}: the {whose}: {error}") from error
    encodings = [parts.encoding for parts in (own, other) if isinstance(parts, RegionParts)]
    if len(set(encodings)) > 1:
        raise ConfigError(
            "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS: {} of the student and {} of the teacher: {} "
            "compares what they multiply; take the teacher's".format(*encodings, names)
        )
    return own


def _parts(
    detector: nn.Module, reading: Sequence[Loss], *, predictions: bool = True
) -> DenseParts | RegionParts:
    """What gives the losses what they read of a head."""
    if reading[0].needs_head is RegionHead:
        return RegionParts(detector, max(cast(Any, loss).proposals for loss in reading))
    depth = max(loss.head_depth for loss in reading)
    return DenseParts(detector, depth, predictions=predictions)
