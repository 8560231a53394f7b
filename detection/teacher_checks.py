"""A teacher that has nothing to teach is refused before a student learns from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from torch import Tensor, nn

from detection.data.mapper import NamingMapper
from detection.data.targets import Entries
from detection.run_state import lent_random_states
from pcka.engine.config import ConfigError
from pcka.engine.preflight import LARGEST, feature_fault
from pcka.teacher import FrozenTeacher

logger = logging.getLogger("detectron2.pcka")

TRIED_IMAGES = 16
SAME_OBJECT = 0.5  # intersection over union
NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d, nn.GroupNorm)


def check_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse statistics of a teacher that are not those of pixels from 0 to 255.

    Raises:
        ConfigError: the key, and what it holds.
    """
    for key, values, least in (("PIXEL_MEAN", mean, 0), ("PIXEL_STD", std, 1)):
        if not all(least <= value <= 255 for value in values):
            raise ConfigError(
                f"the teacher's MODEL.{key}: expected values from {least} to 255, as its images "
                f"have, got {list(values)}; correct its file, or DISTILL.TEACHER.OPTS"
            )


def check_trained(backbone: nn.Module, path: str) -> None:
    """Refuse a file's weights that no training has changed: biases of 0, norms that do nothing.

    Raises:
        ConfigError: all of them are so.
    """
    starts = [bias for name, bias in backbone.state_dict().items() if name.endswith(".bias")]
    starts += [norm.weight - 1 for norm in backbone.modules() if isinstance(norm, NORMS)]
    if starts and not any(values.any() for values in starts):
        raise ConfigError(
            f"{path}: holds weights as a model has them before its training (every bias is 0); an "
            "untrained teacher has to be asked for: DISTILL.TEACHER.RANDOM_WEIGHTS True"
        )


def check_features(teacher: FrozenTeacher, cfg: CfgNode, dataset: Entries) -> None:
    """Run a teacher on an image and its negative, and refuse what nobody can learn from.

    Args:
        teacher: of :func:`detection.teacher.build_teacher`, where it will run.
        cfg: of the run; its images are read as for an evaluation.
        dataset: of the run.

    Raises:
        ConfigError: maps that are not finite, absurdly large, or the same whatever the image.
    """
    with lent_random_states():  # the mapper draws a size
        image = NamingMapper(cfg, False)(dataset[0])["image"]
    maps = teacher([image, 255 - image], tuple(image.shape[-2:]))
    for level, feature in maps.items():
        if not isinstance(feature, Tensor):  # what a head gave
            continue
        if fault := feature_fault(feature.float(), LARGEST):
            wanted = cfg.DISTILL.TEACHER
            raise ConfigError(
                f"DISTILL.TEACHER.WEIGHTS: {wanted.WEIGHTS or 'random weights'}: the teacher's "
                f"maps of {level} {fault}; is the file whole, and described by "
                f"{wanted.CONFIG_FILE!r} and its pixel statistics?"
            )


@torch.no_grad()
def check_detections(teacher: FrozenTeacher, cfg: CfgNode, dataset: Entries) -> None:
    """Let a teacher with a head detect in a few images, and refuse one that finds no object.

    Args:
        teacher: around a :class:`detection.teacher.TeacherDetector`, where it will run.
        cfg: of the run; its images are read as for an evaluation.
        dataset: of the run; up to ``TRIED_IMAGES`` with objects are taken from all over it.

    Raises:
        ConfigError: of none of their objects a box of the right class and half its overlap.
    """
    detect = cast(Any, teacher.model).detect
    shown = [entry for entry in dataset if _objects(entry)]
    shown = shown[:: max(1, len(shown) // TRIED_IMAGES)][:TRIED_IMAGES]
    found = asked = 0
    with lent_random_states():
        read = NamingMapper(cfg, False)
        for entry in shown:
            given = read(entry)
            seen = detect(given["image"], given["height"], given["width"])
            found += _found(seen.to("cpu"), _objects(entry))
            asked += len(_objects(entry))
    logger.info("The teacher finds %d of %d objects in %d images", found, asked, len(shown))
    if asked and not found:
        wanted = cfg.DISTILL.TEACHER
        raise ConfigError(
            f"DISTILL.TEACHER.WEIGHTS: {wanted.WEIGHTS}: the teacher finds none of {asked} objects "
            f"in {len(shown)} images of DATASETS.TRAIN; were its classes, its anchors or its pixel "
            "statistics other ones?"
        )


def _objects(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in entry.get("annotations", []) if not one.get("iscrowd", 0)]


def _found(seen: Any, objects: list[dict[str, Any]]) -> int:
    """How many objects have a detection of their class on them."""
    boxes = [BoxMode.convert(one["bbox"], one["bbox_mode"], BoxMode.XYXY_ABS) for one in objects]
    overlap = pairwise_iou(Boxes(torch.tensor(boxes, dtype=torch.float32)), seen.pred_boxes)
    classes = torch.tensor([one["category_id"] for one in objects])
    hits = (overlap >= SAME_OBJECT) & (classes[:, None] == seen.pred_classes)
    return int(hits.any(1).sum())
