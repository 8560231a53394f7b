"""Make the data sets that a configuration names known to detectron2."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from detection.config import student_architecture
from detection.data.coco_file import DamagedFileError, check_coco, read_coco
from detection.data.digits import digits_scenes
from pcka.engine.config import ConfigError

COCO = {"TRAIN": "COCO_TRAIN", "TEST": "COCO_TEST"}
Categories = list[tuple[int, str]]  # id, name
DIGITS_KEY = "DATASETS.DIGITS"
DIGITS = {"digits_scenes_train": "train", "digits_scenes_test": "test"}


def register_datasets(cfg: CfgNode, *, training: bool = True) -> None:
    """Register the digits scenes and the sets of ``DATASETS.COCO_TRAIN`` and ``COCO_TEST``.

    A set of ``DATASETS.COCO_TRAIN`` (or ``COCO_TEST``) takes the place of ``DATASETS.TRAIN``
    (``TEST``). detectron2's own sets are found under ``DETECTRON2_DATASETS`` as ever.

    Args:
        cfg: ``DATASETS`` is read; ``TRAIN`` and ``TEST`` are set.
        training: ``DATASETS.TRAIN`` is needed, too.

    Raises:
        ConfigError: a missing file, a name that stands for something else, another number of
            classes than the model has, or other classes to test on than to train on.
    """
    keys = cfg.DATASETS
    name_coco_sets(cfg)
    if training and not keys.TRAIN:
        raise ConfigError("DATASETS.TRAIN: expected at least one set, got none")
    categories: dict[str, Categories] = {}
    for split in ("TRAIN", "TEST") if training else ("TEST",):
        for name in keys[split]:
            own = keys[COCO[split]]
            if name == own.NAME:
                key = f"DATASETS.{COCO[split]}"
                files = own.JSON, own.IMAGES
                categories[name] = _register(cfg, key, name, *files, evaluated=split == "TEST")
            elif name in DIGITS:
                categories[name] = _register_digits(cfg, name, evaluated=split == "TEST")
            else:
                _check_known(split, name)
    _check_same(categories)


def name_coco_sets(cfg: CfgNode) -> None:
    """Put the names of ``DATASETS.COCO_TRAIN`` and ``COCO_TEST`` into ``TRAIN`` and ``TEST``.

    Raises:
        ConfigError: files without a name.
    """
    for split, key in COCO.items():
        own = cfg.DATASETS[key]
        if own.NAME:
            cfg.DATASETS[split] = (own.NAME,)
        elif own.JSON or own.IMAGES:
            raise ConfigError(
                f"DATASETS.{key}.NAME: give the set a name, e.g. 'my_{split.lower()}'"
            )


def class_count(cfg: CfgNode) -> int:
    """Number of classes of the student that the configuration describes."""
    dense = {"RetinaNet": cfg.MODEL.RETINANET, "FCOS": cfg.MODEL.FCOS}
    return dense.get(student_architecture(cfg), cfg.MODEL.ROI_HEADS).NUM_CLASSES


def _register_digits(cfg: CfgNode, name: str, *, evaluated: bool) -> Categories:
    keys, split = cfg.DATASETS.DIGITS, DIGITS[name]
    scenes = keys.TRAIN_IMAGES if split == "train" else keys.TEST_IMAGES
    if comm.is_main_process():
        digits_scenes(Path(keys.ROOT), split, scenes, keys.SIDE)
    comm.synchronize()
    annotations, images = digits_scenes(Path(keys.ROOT), split, scenes, keys.SIDE)
    files = str(annotations), str(images)
    try:
        return _register(cfg, DIGITS_KEY, name, *files, evaluated=evaluated)
    except DamagedFileError as error:
        raise ConfigError(
            f"{error}; remove the folder {str(annotations.parent)!r}, and it is made anew"
        ) from error


def _register(
    cfg: CfgNode, key: str, name: str, annotations: str, images: str, *, evaluated: bool
) -> Categories:
    """Register a set that the key describes; return its classes."""
    if not Path(annotations).is_file():
        raise ConfigError(f"{key}.JSON: there is no file {annotations!r}")
    if not images or not Path(images).is_dir():
        raise ConfigError(f"{key}.IMAGES: there is no folder {images!r}")
    file_key = key if key == DIGITS_KEY else f"{key}.JSON"
    content = read_coco(file_key, annotations)
    listed = content["categories"]
    if len(listed) != (classes := class_count(cfg)):
        raise ConfigError(
            f"{key}.JSON: {annotations} has {len(listed)} categories, the model {classes} "
            "classes; set NUM_CLASSES of MODEL.RETINANET, MODEL.ROI_HEADS or MODEL.FCOS"
        )
    check_coco(file_key, annotations, content, images, evaluated=evaluated)
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name)
        if key != DIGITS_KEY and known.get("json_file") != annotations:
            raise ConfigError(
                f"{key}.NAME: {name!r} is the name of another data set; choose a new one"
            )
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)  # the next annotation file may be another
    register_coco_instances(name, _keypoints(listed), annotations, images)
    return sorted((entry["id"], entry["name"]) for entry in listed)


def _check_known(split: str, name: str) -> None:
    """Refuse a set that detectron2 does not know, or whose files are not there."""
    if name not in DatasetCatalog.list():
        raise ConfigError(
            f"DATASETS: no data set is called {name!r}; take {' or '.join(DIGITS)}, one that "
            "detectron2 knows, or describe yours by DATASETS.COCO_TRAIN and COCO_TEST"
        )
    annotations = MetadataCatalog.get(name).get("json_file")
    if annotations and not PathManager.exists(annotations):
        raise ConfigError(
            f"DATASETS.{split}: {name!r} needs the file {annotations!r}; set "
            f"DETECTRON2_DATASETS to its folder, or describe yours by DATASETS.{COCO[split]}"
        )


def _keypoints(categories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Names of a person's keypoints, as COCO calls them, and which ones a flip exchanges."""
    names = next((entry["keypoints"] for entry in categories if entry.get("keypoints")), None)
    if names is None:
        return {}
    pairs = [(name, name.replace("left", "right")) for name in names if "left" in name]
    flips = [pair for pair in pairs if pair[1] in names]
    return {"keypoint_names": names, "keypoint_flip_map": flips}


def _check_same(categories: Mapping[str, Categories]) -> None:
    """A class of one set would be taken for another class of the other set."""
    for one, other in itertools.pairwise(categories):
        if categories[one] != categories[other]:
            raise ConfigError(
                f"DATASETS: {one!r} and {other!r} have other categories (id, name): "
                f"{categories[one][:3]} and {categories[other][:3]}, and so on; give both the same"
            )
