"""From ``DISTILL`` to the losses of a detector."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from detection.config import feature_methods
from detection.levels import patch_for, patches
from pcka import losses
from pcka.engine.config import ConfigError

logger = logging.getLogger("detectron2.pcka")

CONSTANT_UP_TO = {True: 2, False: 1}  # centered or not -> patches whose alignment is constantly 1


def build_losses(
    cfg: CfgNode, levels: Mapping[str, str], shapes: Mapping[str, ShapeSpec]
) -> list[losses.Loss]:
    """Return the losses of ``DISTILL.METHODS``, each with the keywords of its section.

    Args:
        cfg: ``DISTILL`` and ``INPUT.MIN_SIZE_TRAIN`` are read.
        levels: student level -> teacher level.
        shapes: channels and stride of the student's levels.

    Raises:
        ConfigError: an unknown loss, a level that is not matched, or values that a loss refuses.
    """
    built = []
    if len(set(cfg.DISTILL.METHODS)) != len(cfg.DISTILL.METHODS):
        raise ConfigError(f"DISTILL.METHODS: expected each loss once, got {cfg.DISTILL.METHODS}")
    for name in cfg.DISTILL.METHODS:
        if name not in feature_methods():
            raise ConfigError(
                f"DISTILL.METHODS: no loss of feature maps is called {name!r}; there are "
                f"{', '.join(feature_methods())}"
            )
        keywords = _keywords(name, cfg.DISTILL[name], list(levels))
        try:
            built.append(losses.build(name, **keywords))
        except ValueError as error:
            raise ConfigError(f"DISTILL.{name}: {error}") from error
        if name == "PCKA" and "rows" in keywords["relations"]:
            _check_patches(keywords, shapes, min(cfg.INPUT.MIN_SIZE_TRAIN))
    return built


def _keywords(name: str, section: CfgNode, levels: list[str]) -> dict[str, Any]:
    stages = list(section.STAGES) or levels
    if unmatched := set(stages) - set(levels):
        raise ConfigError(
            f"DISTILL.{name}.STAGES: {', '.join(sorted(unmatched))} is not among DISTILL.LEVELS "
            f"{levels}; add it there"
        )
    keywords: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, list | tuple):
            value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        keywords[key.lower()] = value
    keywords["stages"] = tuple(stages)
    for key in ("weights", "patch_sizes"):
        if key in keywords and len(keywords[key]) == 1:
            keywords[key] *= len(stages)
    return keywords


def _check_patches(keywords: Mapping[str, Any], shapes: Mapping[str, ShapeSpec], side: int) -> None:
    """Say which level of PCKA has too few patches for a signal, at the smallest training size."""
    for level, patch in zip(keywords["stages"], keywords["patch_sizes"]):
        stride = shapes[level].stride
        number = patches(side, stride, patch)
        if number <= CONSTANT_UP_TO[keywords["center"]]:
            logger.warning(
                "DISTILL.PCKA.PATCH_SIZES: at %d pixels the level %s (stride %d) has %d patch(es) "
                "of size %s, too few to carry a signal; a patch of %d would leave %d",
                side, level, stride, number, patch, patch_for(side, stride),
                patches(side, stride, patch_for(side, stride)),
            )  # fmt: skip
