"""Make the data sets that a configuration names known to detectron2."""

from __future__ import annotations

import json
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm

from detection.config import ConfigError
from detection.data.digits import digits_scenes

COCO = {"TRAIN": "COCO_TRAIN", "TEST": "COCO_TEST"}
DIGITS = {"digits_scenes_train": "train", "digits_scenes_test": "test"}


def register_datasets(cfg: CfgNode) -> None:
    """Register the digits scenes and the sets of ``DATASETS.COCO_TRAIN`` and ``COCO_TEST``.

    A set of ``DATASETS.COCO_TRAIN`` (or ``COCO_TEST``) takes the place of ``DATASETS.TRAIN``
    (``TEST``). detectron2's own sets are found under ``DETECTRON2_DATASETS`` as ever.

    Raises:
        ConfigError: a missing file, a name that stands for something else, or another number of
            classes than the model has.
    """
    keys = cfg.DATASETS
    for key in COCO.values():
        if keys[key].NAME:
            _register(f"DATASETS.{key}", keys[key].NAME, keys[key].JSON, keys[key].IMAGES)
            _check_classes(cfg, f"DATASETS.{key}", keys[key].JSON)
    name_coco_sets(cfg)
    for name in (*keys.TRAIN, *keys.TEST):
        if name in DIGITS:
            _register("DATASETS.DIGITS", name, *map(str, _digits(keys.DIGITS, DIGITS[name])))
        elif name not in DatasetCatalog.list():
            raise ConfigError(
                f"DATASETS: no data set is called {name!r}; take one that detectron2 knows, "
                f"{' or '.join(DIGITS)}, or describe yours by DATASETS.COCO_TRAIN and COCO_TEST "
                "(NAME, JSON, IMAGES)"
            )


def name_coco_sets(cfg: CfgNode) -> None:
    """Put the names of ``DATASETS.COCO_TRAIN`` and ``COCO_TEST`` into ``TRAIN`` and ``TEST``."""
    for split, key in COCO.items():
        if cfg.DATASETS[key].NAME:
            cfg.DATASETS[split] = (cfg.DATASETS[key].NAME,)


def class_count(cfg: CfgNode) -> int:
    """Number of classes of the student that the configuration describes."""
    architecture = cfg.DISTILL.STUDENT or cfg.MODEL.META_ARCHITECTURE
    dense = {"RetinaNet": cfg.MODEL.RETINANET, "FCOS": cfg.MODEL.FCOS}
    return dense.get(architecture, cfg.MODEL.ROI_HEADS).NUM_CLASSES


def _digits(keys: CfgNode, split: str) -> tuple[Path, Path]:
    scenes = keys.TRAIN_IMAGES if split == "train" else keys.TEST_IMAGES
    if comm.is_main_process():
        digits_scenes(Path(keys.ROOT), split, scenes, keys.SIDE)
    comm.synchronize()
    return digits_scenes(Path(keys.ROOT), split, scenes, keys.SIDE)


def _register(key: str, name: str, annotations: str, images: str) -> None:
    for leaf, path in (("JSON", Path(annotations)), ("IMAGES", Path(images))):
        if not path.exists():
            raise ConfigError(f"{key}.{leaf}: {str(path)!r} does not exist")
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name)
        if key != "DATASETS.DIGITS" and known.get("json_file") != annotations:
            raise ConfigError(
                f"{key}.NAME: {name!r} is the name of another data set; choose a new one"
            )
        DatasetCatalog.remove(name)
        _forget_metadata(name)
    register_coco_instances(name, {}, annotations, images)


def _forget_metadata(name: str) -> None:
    """The next registration under this name may have another annotation file."""
    if name in MetadataCatalog.list():
        MetadataCatalog.remove(name)


def _check_classes(cfg: CfgNode, key: str, annotations: str) -> None:
    categories = len(json.loads(Path(annotations).read_text())["categories"])
    if categories != class_count(cfg):
        raise ConfigError(
            f"{key}.JSON: {annotations} has {categories} categories, the model "
            f"{class_count(cfg)} classes; set MODEL.RETINANET.NUM_CLASSES, "
            "MODEL.ROI_HEADS.NUM_CLASSES or MODEL.FCOS.NUM_CLASSES"
        )
