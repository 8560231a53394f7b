"""Which levels of both pyramids are compared, and by which losses."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import cast

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils import comm

from pcka import losses
from pcka.engine import distill
from pcka.engine.config import ConfigError
from pcka.losses.numerics import CONSTANT_UP_TO

logger = logging.getLogger("detectron2.pcka")

DEFAULT_LEVELS = 4
ENOUGH_PATCHES = 16


def match_levels(
    wanted: Sequence[str], student: Mapping[str, ShapeSpec], teacher: Mapping[str, ShapeSpec]
) -> dict[str, str]:
    """Return student level -> teacher level.

    Args:
        wanted: ``"p3"`` (the same name in both) or ``"p3:p2"`` (student, teacher); empty means the
            student's first four levels, from fine to coarse.
        student: shape of each level of the student's backbone.
        teacher: shape of each level of the teacher's backbone.

    Raises:
        ConfigError: a backbone lacks a level, or a level of the student is named twice.
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
                gives = ", ".join(f"{name} (stride {spec.stride})" for name, spec in known.items())
                raise ConfigError(
                    f"DISTILL.LEVELS: {entry!r} names {level!r}, which the {role}'s backbone does "
                    f"not have; it gives {gives}"
                )
        if own in pairs:
            raise ConfigError(f"DISTILL.LEVELS: the student's {own!r} appears twice in {wanted}")
        pairs[own] = other
    return pairs


def build_losses(
    cfg: CfgNode, levels: Mapping[str, str], shapes: Mapping[str, ShapeSpec]
) -> list[losses.Loss]:
    """Return the losses of ``DISTILL.METHODS``, each with the keywords of its section.

    Args:
        cfg: ``DISTILL``, ``INPUT.MIN_SIZE_TRAIN`` and ``SOLVER.IMS_PER_BATCH`` are read.
        levels: student level -> teacher level.
        shapes: channels and stride of the student's levels.

    Raises:
        ConfigError: a loss is unknown or unsuitable for detectors, a level is not matched, or a
            loss refuses its values.
    """
    images, key = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(), "SOLVER.IMS_PER_BATCH"
    built = distill.build_losses(
        cfg.DISTILL.METHODS,
        cfg.DISTILL,
        levels,
        default_stages=list(levels),
        unfit=lambda loss: _unfit(loss) or distill.too_few_images(loss, images, key),
        taps_key="DISTILL.LEVELS",
    )
    for name, loss in zip(cfg.DISTILL.METHODS, built):
        if name == "PCKA":
            _check_patches(cast(losses.PCKA, loss), shapes, min(cfg.INPUT.MIN_SIZE_TRAIN))
    return built


def needs_head(methods: Sequence[str]) -> bool:
    """Whether a loss reads the teacher's head.

    Raises:
        ConfigError: there is no loss of that name.
    """
    distill.check_methods(methods)
    return any(losses.find(name).needs_head is not None for name in methods)


def reads_levels(methods: Sequence[str]) -> bool:
    """Whether a loss compares maps of levels, and not only heads.

    Raises:
        ConfigError: there is no loss of that name.
    """
    distill.check_methods(methods)
    return any("stages" in losses.defaults(name) or losses.find(name).taps for name in methods)


def _unfit(loss: losses.Loss) -> str | None:
    """Return why a loss does not suit a detector's feature maps and heads; None if it does."""
    needs = {
        "logits": loss.needs_logits,
        "a target": loss.needs_target,
        "indices of samples": loss.needs_indices,
        "more from the teacher": loss.needs_context,
    }
    lacking = [name for name, needed in needs.items() if needed]
    if lacking:
        return f"needs {lacking[0]}, but detectors only support losses of feature maps and heads"
    if not (loss.needs_teacher and (loss.taps or loss.needs_head)):
        return "compares neither feature maps nor heads; detectors support no other losses"
    return None


def _check_patches(loss: losses.PCKA, shapes: Mapping[str, ShapeSpec], side: int) -> None:
    """Warn of PCKA levels with too few patches for a signal at the smallest training size."""
    if "rows" not in loss.relations:
        return
    for level, patch in zip(loss.taps, loss.patch_sizes):
        stride = cast(int, shapes[level].stride)
        number = patches(side, stride, patch)
        if number <= CONSTANT_UP_TO[loss.center]:
            logger.warning(
                "DISTILL.PCKA.PATCH_SIZES: at %d pixels the level %s (stride %d) has %d patch(es) "
                "of size %s, too few to carry a signal; a patch of %d would leave %d",
                side, level, stride, number, patch, patch_for(side, stride),
                patches(side, stride, patch_for(side, stride)),
            )  # fmt: skip


def patches(side: int, stride: int, patch: int | tuple[int, int]) -> int:
    """Return the number of patches of a square image's feature map; ``side`` in image pixels."""
    height, width = (patch, patch) if isinstance(patch, int) else patch
    own = math.ceil(side / stride)
    return math.ceil(own / height) * math.ceil(own / width)


def patch_for(side: int, stride: int) -> int:
    """Return the largest power of two that leaves ``ENOUGH_PATCHES`` patches, or 1."""
    sizes = [2**power for power in range(7, -1, -1)]
    return next((p for p in sizes if patches(side, stride, p) >= ENOUGH_PATCHES), 1)
