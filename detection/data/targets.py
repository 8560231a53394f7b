"""Checks, before a run begins, that its data sets can be read and suit the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from detection.config import student_architecture
from pcka.engine.config import ConfigError

Entries = list[dict[str, Any]]
SEGMENTER = "SemanticSegmentor"
SEGMENTERS = (SEGMENTER, "PanopticFPN")  # predict a class for every pixel
WITH_REGIONS = ("GeneralizedRCNN", "PanopticFPN")  # may have mask and keypoint heads
COCO_KEYPOINTS = 17


def training_set(cfg: CfgNode) -> Entries:
    """Return the entries of ``DATASETS.TRAIN`` that a run learns from.

    Raises:
        ConfigError: a set cannot be read, is empty, or lacks what the student learns.
    """
    keypoints = cfg.MODEL.KEYPOINT_ON and cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    try:
        entries: Entries = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except (AssertionError, KeyError, ValueError, TypeError, OSError) as error:
        asked = f", with at least {keypoints} keypoints per image" if keypoints else ""
        raise ConfigError(f"DATASETS.TRAIN{asked}: {_reason(error)}") from error
    architecture = student_architecture(cfg)
    if architecture in SEGMENTERS:
        _check_segmented("DATASETS.TRAIN", architecture, entries)
    if architecture in WITH_REGIONS and cfg.MODEL.MASK_ON:
        _check_masks(entries)
    return entries


def first_test_set(cfg: CfgNode) -> str:
    """Return the first name in ``DATASETS.TEST``, whose images are shown and timed.

    Raises:
        ConfigError: there is none.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError(
            "DATASETS.TEST: expected a set of images to evaluate and show, got none; name one"
        )
    return cfg.DATASETS.TEST[0]


def check_test_sets(cfg: CfgNode) -> None:
    """Read ``DATASETS.TEST`` as the evaluation will, which may only come after training.

    Raises:
        ConfigError: a set is named twice, cannot be read, its images are missing, or it lacks what
            the evaluation compares with.
    """
    names, architecture = cfg.DATASETS.TEST, student_architecture(cfg)
    if len(set(names)) != len(names):
        raise ConfigError(f"DATASETS.TEST: expected each set once, got {list(names)}")
    for name in names:
        try:
            entries: Entries = DatasetCatalog.get(name)
        except (AssertionError, KeyError, ValueError, TypeError, OSError) as error:
            raise ConfigError(f"DATASETS.TEST: {name!r}: {_reason(error)}") from error
        if not entries:
            raise ConfigError(f"DATASETS.TEST: {name!r} has no images")
        if not Path(entries[0]["file_name"]).is_file():
            raise ConfigError(
                f"DATASETS.TEST: {name!r}: there is no image {entries[0]['file_name']!r}"
            )
        known = MetadataCatalog.get(name)
        if architecture in SEGMENTERS:
            _check_segmented(f"DATASETS.TEST: {name!r}", architecture, entries)
            if not hasattr(known, "stuff_classes") or not hasattr(known, "ignore_label"):
                raise ConfigError(
                    f"DATASETS.TEST: {name!r} has no stuff_classes and ignore_label in "
                    f"detectron2's metadata, needed to evaluate a {architecture}"
                )
        if architecture in WITH_REGIONS and cfg.MODEL.KEYPOINT_ON:
            _check_sigmas(cfg.TEST.KEYPOINT_OKS_SIGMAS, name, known.get("keypoint_names", ()))


def _check_segmented(key: str, architecture: str, entries: Entries) -> None:
    missing = [entry for entry in entries if "sem_seg_file_name" not in entry]
    if missing:
        raise ConfigError(
            f"{key}: a {architecture} needs a class for every pixel, and {len(missing)} of "
            f"{len(entries)} images have none (no sem_seg_file_name; first: "
            f"{_file_of(missing[0])}); use a set like "
            "'coco_2017_train_panoptic_stuffonly', describe yours with DATASETS.SEMSEG_TRAIN and "
            "SEMSEG_TEST, or use a student of boxes"
        )


def _check_masks(entries: Entries) -> None:
    missing = [entry for entry in entries if any(map(_lacks_mask, entry.get("annotations", [])))]
    if missing:
        raise ConfigError(
            f"MODEL.MASK_ON: in {len(missing)} of {len(entries)} images of DATASETS.TRAIN an "
            f"object has no segmentation (first: {_file_of(missing[0])}); set it to False"
        )


def _lacks_mask(annotation: Mapping[str, Any]) -> bool:
    return not annotation.get("iscrowd", 0) and "segmentation" not in annotation


def _check_sigmas(sigmas: Sequence[float], name: str, keypoints: Sequence[str]) -> None:
    given, needed = len(sigmas) or COCO_KEYPOINTS, len(keypoints) or COCO_KEYPOINTS
    if given != needed:
        raise ConfigError(
            f"TEST.KEYPOINT_OKS_SIGMAS: the objects of {name!r} have {needed} keypoints, but there "
            f"are sigmas for {given} ({'given' if sigmas else 'of COCO'}); give {needed}"
        )


def _file_of(entry: Mapping[str, Any]) -> str:
    return repr(entry["file_name"])


def _reason(error: Exception) -> object:
    return error.args[0] if isinstance(error, KeyError) else error
