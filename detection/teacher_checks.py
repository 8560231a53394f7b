"""Checks that refuse a useless teacher before a student learns from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import SemanticSegmentor
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from torch import Tensor, nn

from detection.data.mapper import make_mapper
from detection.data.pixels import Labels
from detection.data.targets import Entries
from detection.run_state import lent_random_states
from pcka.engine.config import ConfigError
from pcka.engine.preflight import LARGEST, feature_fault
from pcka.teacher import FrozenTeacher

logger = logging.getLogger("detectron2.pcka")

TRIED_IMAGES = 16
SAME_OBJECT = 0.5  # intersection over union
NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d, nn.GroupNorm)


def check_teacher(teacher: FrozenTeacher, cfg: CfgNode, dataset: Entries) -> str:
    """Try a teacher on a few images before a student learns from it.

    Args:
        teacher: from :func:`detection.teacher.build_teacher`, on its device.
        cfg: the run's configuration.
        dataset: training entries of the run.

    Returns:
        A description of what it finds in them; "" if it has no head, or a random one.

    Raises:
        ConfigError: see :func:`check_features`, :func:`check_detections` and :func:`check_pixels`.
    """
    check_features(teacher, cfg, dataset)
    detector = getattr(teacher.model, "detector", None)
    if detector is None or cfg.DISTILL.TEACHER.RANDOM_WEIGHTS:
        return ""
    if gives_pixels(detector, dataset):
        return check_pixels(teacher, cfg, dataset)
    if isinstance(detector, SemanticSegmentor):  # and the set has only boxes
        return ""
    return check_detections(teacher, cfg, dataset)


def gives_pixels(detector: nn.Module, dataset: Entries) -> bool:
    """Whether a detector predicts pixel classes, and the set has labels to compare them with."""
    return hasattr(detector, "sem_seg_head") and "sem_seg_file_name" in dataset[0]


def check_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse teacher statistics that cannot belong to pixels from 0 to 255.

    Raises:
        ConfigError: the message names the key and its value.
    """
    for key, values, least in (("PIXEL_MEAN", mean, 0), ("PIXEL_STD", std, 1)):
        if not all(least <= value <= 255 for value in values):
            raise ConfigError(
                f"the teacher's MODEL.{key}: expected values from {least} to 255, like its "
                f"images', got {list(values)}; correct its file, or DISTILL.TEACHER.OPTS"
            )


def check_trained(backbone: nn.Module, path: str) -> None:
    """Refuse a file of untrained weights: all biases 0, all norms the identity.

    Raises:
        ConfigError: the weights are untrained.
    """
    starts = [bias for name, bias in backbone.state_dict().items() if name.endswith(".bias")]
    starts += [norm.weight - 1 for norm in backbone.modules() if isinstance(norm, NORMS)]
    if starts and not any(values.any() for values in starts):
        raise ConfigError(
            f"{path}: holds the weights of an untrained model (every bias is 0); for an untrained "
            "teacher, set DISTILL.TEACHER.RANDOM_WEIGHTS True"
        )


def check_features(teacher: FrozenTeacher, cfg: CfgNode, dataset: Entries) -> None:
    """Run a teacher on an image and its negative, and refuse feature maps that are useless.

    Args:
        teacher: from :func:`detection.teacher.build_teacher`, on its device.
        cfg: the run's configuration; images are read as for an evaluation.
        dataset: training entries of the run.

    Raises:
        ConfigError: maps are not finite, absurdly large, or the same for both images.
    """
    with lent_random_states():  # the mapper draws a random size
        image = make_mapper(cfg, training=False)(dataset[0])["image"]
    maps = teacher([image, 255 - image], tuple(image.shape[-2:]))
    for level, feature in maps.items():
        if not isinstance(feature, Tensor):  # a head's outputs
            continue
        if fault := feature_fault(feature.float(), LARGEST):
            wanted = cfg.DISTILL.TEACHER
            raise ConfigError(
                f"DISTILL.TEACHER.WEIGHTS: {wanted.WEIGHTS or 'random weights'}: the teacher's "
                f"maps of {level} {fault}; is the file complete, and does it match "
                f"{wanted.CONFIG_FILE!r} and its pixel statistics?"
            )


@torch.no_grad()
def check_detections(teacher: FrozenTeacher, cfg: CfgNode, dataset: Entries) -> str:
    """Run a teacher with a head on a few images, and refuse one that finds no object.

    Args:
        teacher: wraps a :class:`detection.teacher.TeacherDetector`, on its device.
        cfg: the run's configuration; images are read as for an evaluation.
        dataset: training entries; up to ``TRIED_IMAGES`` with objects are used, spread over it.

    Returns:
        A description of how many objects it finds.

    Raises:
        ConfigError: no object has a detection of its class with an IoU of at least 0.5.
    """
    detect = cast(Any, teacher.model).detect
    shown = some([entry for entry in dataset if objects_of(entry)])
    found = asked = 0
    with lent_random_states():
        read = make_mapper(cfg, training=False)
        for entry in shown:
            given = read(entry)
            seen = detect(given["image"], given["height"], given["width"])
            hits = found_objects(seen.to("cpu"), objects_of(entry))
            found += int(hits.sum())
            asked += len(hits)
    told = f"finds {found} of {asked} objects in {len(shown)} images"
    logger.info("The teacher %s", told)
    if asked and not found:
        wanted = cfg.DISTILL.TEACHER
        raise ConfigError(
            f"DISTILL.TEACHER.WEIGHTS: {wanted.WEIGHTS}: the teacher finds none of {asked} objects "
            f"in {len(shown)} images of DATASETS.TRAIN; are its classes, anchors or pixel "
            "statistics different?"
        )
    return told


@torch.no_grad()
def check_pixels(teacher: FrozenTeacher, cfg: CfgNode, dataset: Entries) -> str:
    """Let a teacher segment a few images, and refuse one that is no better than guessing.

    Args:
        teacher: wraps a :class:`detection.teacher.TeacherDetector`, on its device.
        cfg: the run's configuration; images are read as for an evaluation.
        dataset: training entries; up to ``TRIED_IMAGES`` are used, spread over it.

    Returns:
        A description of its mean intersection over union.

    Raises:
        ConfigError: it predicts classes that the student does not have, or its mean intersection
            over union is no higher than that of predicting the most frequent class everywhere.
    """
    classify, labels = cast(Any, teacher.model).classify, Labels.of(cfg)
    counts = torch.zeros(labels.classes, labels.classes, dtype=torch.int64)  # truth, prediction
    wanted, shown = cfg.DISTILL.TEACHER, some(dataset)
    with lent_random_states():
        read = make_mapper(cfg, training=False)
        for entry in shown:
            truth = read_truth(labels, entry)
            counts += pixel_counts(classify(read(entry)["image"], *truth.shape), truth, labels)
    guess = torch.zeros_like(counts)
    guess[:, counts.sum(1).argmax()] = counts.sum(1)
    reached, guessed = (mean_iou(one) for one in (counts, guess))
    logger.info("The teacher's mIoU in %d training images is %.2f %%", len(shown), reached)
    if reached <= guessed:
        raise ConfigError(
            f"DISTILL.TEACHER.WEIGHTS: {wanted.WEIGHTS}: the teacher's mIoU in {len(shown)} images "
            f"of DATASETS.TRAIN is {reached:.2f} %, and {guessed:.2f} % is reached by one class "
            "everywhere; are its classes or pixel statistics different?"
        )
    return f"has an mIoU of {reached:.2f} % in {len(shown)} images"


def read_truth(labels: Labels, entry: dict[str, Any]) -> Tensor:
    """Return the true class of each pixel of an entry's image, ``(H, W)`` int64."""
    return torch.from_numpy(labels.read(entry["sem_seg_file_name"]).astype("int64"))


def pixel_counts(given: Tensor, truth: Tensor, labels: Labels) -> Tensor:
    """Count pixels by true and predicted class, ``(K, K)``.

    Raises:
        ConfigError: a predicted class is not among the labels.
    """
    given, counted = given.cpu(), truth != labels.ignored
    if (found := int(given.max()) + 1) > labels.classes:
        raise ConfigError(
            f"DISTILL.TEACHER: it gives a pixel the class {found - 1}, but the student has "
            f"{labels.classes} classes; give both models the same"
        )
    pairs = truth[counted] * labels.classes + given[counted]
    return torch.bincount(pairs, minlength=labels.classes**2).view(labels.classes, labels.classes)


def mean_iou(counts: Tensor) -> float:
    """Mean intersection over union of the classes present in the truth, in percent.

    Args:
        counts: ``(K, K)``, pixels by true and predicted class.
    """
    found = class_ious(counts)
    return float(100 * found.mean()) if len(found) else 0.0


def class_ious(counts: Tensor) -> Tensor:
    """Intersection over union of each class in the truth, from 0 to 1; see :func:`mean_iou`."""
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    there = counts.sum(1) > 0
    return counts.diagonal()[there] / union[there]


def some(entries: Entries) -> Entries:
    """Return up to ``TRIED_IMAGES`` entries, spread over a set."""
    return entries[:: max(1, len(entries) // TRIED_IMAGES)][:TRIED_IMAGES]


def objects_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the annotations of an entry that a detector should find, without crowds."""
    return [one for one in entry.get("annotations", []) if not one.get("iscrowd", 0)]


def found_objects(seen: Any, objects: list[dict[str, Any]]) -> Tensor:
    """Return which objects have a detection of their class on them, ``(M,)`` bool."""
    boxes = [BoxMode.convert(one["bbox"], one["bbox_mode"], BoxMode.XYXY_ABS) for one in objects]
    overlap = pairwise_iou(Boxes(torch.tensor(boxes, dtype=torch.float32)), seen.pred_boxes)
    classes = torch.tensor([one["category_id"] for one in objects])
    hits = (overlap >= SAME_OBJECT) & (classes[:, None] == seen.pred_classes)
    return hits.any(1)
