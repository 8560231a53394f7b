"""Register the data sets that a configuration names with detectron2."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from detection.config import student_architecture
from detection.data.annotations import Annotations
from detection.data.coco_file import DamagedFileError, check_coco, read_coco
from detection.data.digits import LABELS, PIXEL_CLASSES, digits_scenes
from detection.data.pixels import Labels, check_count, class_names, read_folders
from detection.data.targets import SEGMENTER
from detection.data.voc import read_voc
from detection.data.yolo import read_yolo
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import write_text

# Readers of boxes in formats other than COCO's; their keys are DATASETS.<format>_TRAIN and _TEST.
READERS: dict[str, Callable[[str, Path, str], Annotations]] = {"VOC": read_voc, "YOLO": read_yolo}
PIXELS = "SEMSEG"  # folders of images and of label images
FORMATS = ("COCO", *READERS, PIXELS)
CONVERTED = "annotations"  # folder in OUTPUT_DIR for annotations converted to COCO's format
Categories = list[tuple[int, str]]  # id, name
DIGITS_KEY = "DATASETS.DIGITS"
DIGITS = {"digits_scenes_train": "train", "digits_scenes_test": "test"}


def register_datasets(cfg: CfgNode, *, training: bool = True) -> None:
    """Register the digits scenes and custom data sets.

    Custom sets are boxes in COCO, VOC or YOLO format, or folders of label images. A set given by
    ``DATASETS.COCO_TRAIN`` (``VOC_TRAIN``, ``YOLO_TRAIN``, ``SEMSEG_TRAIN``) replaces
    ``DATASETS.TRAIN``, and one given by ``COCO_TEST`` and so on replaces ``TEST``. detectron2's own
    sets are found under ``DETECTRON2_DATASETS`` as usual. VOC and YOLO boxes are written to a file
    in COCO's format, in ``OUTPUT_DIR``.

    Args:
        cfg: ``DATASETS`` is read; ``TRAIN`` and ``TEST`` are set.
        training: also register ``DATASETS.TRAIN``, which must not be empty.

    Raises:
        ConfigError: a file is missing, a name is taken, the number of classes is not the model's,
            or the sets to train and test on have different classes.
    """
    keys = cfg.DATASETS
    name_own_sets(cfg)
    if training and not keys.TRAIN:
        raise ConfigError("DATASETS.TRAIN: expected at least one set, got none")
    categories: dict[str, Categories] = {}
    for split in ("TRAIN", "TEST") if training else ("TEST",):
        own = _own_key(cfg, split)
        for name in keys[split]:
            evaluated = split == "TEST"
            if own and name == keys[own].NAME:
                categories[name] = _register_own(cfg, own, evaluated=evaluated)
            elif name in DIGITS:
                categories[name] = _register_digits(cfg, name, evaluated=evaluated)
            else:
                _check_known(split, name)
    _check_same(categories)


def name_own_sets(cfg: CfgNode) -> None:
    """Put the names of custom sets into ``DATASETS.TRAIN`` and ``TEST``.

    Raises:
        ConfigError: a set has files but no name, or there are several sets for one split.
    """
    for split in ("TRAIN", "TEST"):
        if own := _own_key(cfg, split):
            cfg.DATASETS[split] = (cfg.DATASETS[own].NAME,)


def _own_key(cfg: CfgNode, split: str) -> str:
    """Return the key of a split's custom set, e.g. ``VOC_TRAIN``; "" if there is none."""
    keys = [f"{name}_{split}" for name in FORMATS]
    named = [key for key in keys if cfg.DATASETS[key].NAME]
    if len(named) > 1:
        raise ConfigError(
            f"DATASETS.{named[1]}: DATASETS.{named[0]} also describes a set; set the NAME of one "
            "of them to ''"
        )
    if named:
        return named[0]
    for key in keys:
        if any(value for leaf, value in cfg.DATASETS[key].items() if leaf != "SPLIT"):
            raise ConfigError(
                f"DATASETS.{key}.NAME: give the set a name, e.g. 'my_{split.lower()}'"
            )
    return ""


def class_count(cfg: CfgNode) -> int:
    """Return the student's number of object classes."""
    return cfg.MODEL[_head_section(cfg)].NUM_CLASSES


def _head_section(cfg: CfgNode) -> str:
    """Return the section of ``MODEL`` that holds the student's number of classes."""
    architecture = student_architecture(cfg)
    dense = ("RetinaNet", "FCOS", "GFL", "RepPoints")
    return architecture.upper() if architecture in dense else "ROI_HEADS"


def _register_digits(cfg: CfgNode, name: str, *, evaluated: bool) -> Categories:
    keys, split = cfg.DATASETS.DIGITS, DIGITS[name]
    scenes = keys.TRAIN_IMAGES if split == "train" else keys.TEST_IMAGES
    if comm.is_main_process():
        digits_scenes(Path(keys.ROOT), split, scenes, keys.SIDE)
    comm.synchronize()
    annotations, images = digits_scenes(Path(keys.ROOT), split, scenes, keys.SIDE)
    folder = annotations.parent
    try:
        if student_architecture(cfg) == SEGMENTER:
            return _register_pixels(cfg, name, DIGITS_KEY, (images, folder / LABELS), PIXEL_CLASSES)
        content = read_coco(DIGITS_KEY, str(annotations))
        _check(cfg, DIGITS_KEY, str(annotations), content, str(images), evaluated=evaluated)
    except DamagedFileError as error:
        raise ConfigError(
            f"{error}; remove the folder {str(folder)!r} to create it again"
        ) from error
    return _register(name, str(annotations), content, str(images))


def _register_own(cfg: CfgNode, own: str, *, evaluated: bool) -> Categories:
    """Register the custom set that a key describes, e.g. ``VOC_TRAIN``."""
    key, keys, form = f"DATASETS.{own}", cfg.DATASETS[own], own.partition("_")[0]
    architecture = student_architecture(cfg)
    if (architecture == SEGMENTER) != (form == PIXELS):
        learns, other = ("pixels", PIXELS) if architecture == SEGMENTER else ("boxes", "COCO")
        raise ConfigError(
            f"{key}: a {architecture} learns the classes of {learns}; describe your set with "
            f"DATASETS.{other}_{own.partition('_')[2]}"
        )
    if form == PIXELS:
        return _register_own_pixels(cfg, key, keys, evaluated=evaluated)
    if form in READERS:
        if not keys.ROOT or not Path(keys.ROOT).expanduser().exists():
            raise ConfigError(f"{key}.ROOT: there is no folder {keys.ROOT!r}")
        found = READERS[form](f"{key}.ROOT", Path(keys.ROOT).expanduser(), keys.SPLIT)
        content, images, source = found.content, str(found.folder), found.source
        _check(cfg, f"{key}.ROOT", source, content, images, evaluated=evaluated)
        annotations = _converted(cfg, keys.NAME, content)
    else:
        annotations, images, source = keys.JSON, keys.IMAGES, keys.JSON
        if not Path(annotations).is_file():
            raise ConfigError(f"{key}.JSON: there is no file {annotations!r}")
        if not images or not Path(images).is_dir():
            raise ConfigError(f"{key}.IMAGES: there is no folder {images!r}")
        content = read_coco(f"{key}.JSON", annotations)
        _check(cfg, f"{key}.JSON", source, content, images, evaluated=evaluated)
    _check_name(key, keys.NAME, source)
    categories = _register(keys.NAME, annotations, content, images)
    MetadataCatalog.get(keys.NAME).source = source
    return categories


def _register_own_pixels(cfg: CfgNode, key: str, keys: CfgNode, *, evaluated: bool) -> Categories:
    """Register a custom set given by a folder of images and one of label images."""
    _check_name(key, keys.NAME, keys.LABELS)
    classes = class_names(f"{key}.CLASSES", keys.CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    folders = keys.IMAGES, keys.LABELS
    return _register_pixels(cfg, keys.NAME, key, folders, classes, evaluated=evaluated)


def _register_pixels(
    cfg: CfgNode,
    name: str,
    key: str,
    folders: tuple[str | Path, str | Path],
    classes: Sequence[str],
    *,
    evaluated: bool = False,
) -> Categories:
    """Register images and label images under a name; return their classes."""
    check_count(key, classes, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    labels = Labels.of(cfg)
    entries = read_folders(key, *folders, labels, evaluated=evaluated)
    _forget(name)
    DatasetCatalog.register(name, lambda: entries)
    MetadataCatalog.get(name).set(
        stuff_classes=list(classes), ignore_label=labels.ignored, source=str(folders[1])
    )
    return list(enumerate(classes))


def _check(
    cfg: CfgNode, key: str, source: str, content: dict[str, Any], images: str, *, evaluated: bool
) -> None:
    """Refuse content that would fail later; ``source`` names the annotations in messages."""
    if (found := len(content["categories"])) != (classes := class_count(cfg)):
        raise ConfigError(
            f"{key}: {source} has {found} categories, the model {classes} classes; set "
            f"MODEL.{_head_section(cfg)}.NUM_CLASSES {found}, which a "
            f"{student_architecture(cfg)} reads"
        )
    check_coco(key, source, content, images, evaluated=evaluated)


def _converted(cfg: CfgNode, name: str, content: dict[str, Any]) -> str:
    """Write annotations in COCO's format, which the evaluation reads; return the file.

    The name contains a hash of the content, so that runs in one folder do not share a wrong file.
    """
    text = json.dumps(content)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    file = Path(cfg.OUTPUT_DIR, CONVERTED, f"{name}-{digest}.json")
    if comm.is_main_process() and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    comm.synchronize()
    return str(file)


def _check_name(key: str, name: str, source: str) -> None:
    """Refuse a name that belongs to another set."""
    if name in DatasetCatalog.list() and _source_of(name) != source:
        raise ConfigError(f"{key}.NAME: {name!r} is the name of another data set; choose a new one")


def _source_of(name: str) -> str | None:
    known = MetadataCatalog.get(name)
    source: str | None = known.get("source", known.get("json_file"))
    return source


def _register(name: str, annotations: str, content: dict[str, Any], images: str) -> Categories:
    """Register a file in COCO's format under a name; return its classes."""
    listed = content["categories"]
    _forget(name)
    register_coco_instances(name, _keypoints(listed), annotations, images)
    return sorted((entry["id"], entry["name"]) for entry in listed)


def _forget(name: str) -> None:
    """Unregister a name, so that it can be registered again with another file."""
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _check_known(split: str, name: str) -> None:
    """Refuse a set that detectron2 does not know, or whose files are missing."""
    if name not in DatasetCatalog.list():
        raise ConfigError(
            f"DATASETS: no data set is called {name!r}; use {' or '.join(DIGITS)}, one that "
            "detectron2 knows, or describe yours with DATASETS.COCO_TRAIN, VOC_TRAIN, YOLO_TRAIN "
            "or SEMSEG_TRAIN, and COCO_TEST etc."
        )
    annotations = MetadataCatalog.get(name).get("json_file")
    if annotations and not PathManager.exists(annotations):
        raise ConfigError(
            f"DATASETS.{split}: {name!r} needs the file {annotations!r}; set "
            f"DETECTRON2_DATASETS to its folder, or describe yours with DATASETS.COCO_{split}"
        )


def _keypoints(categories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the names of a person's keypoints in COCO, and which of them a flip swaps."""
    names = next((entry["keypoints"] for entry in categories if entry.get("keypoints")), None)
    if names is None:
        return {}
    pairs = [(name, name.replace("left", "right")) for name in names if "left" in name]
    flips = [pair for pair in pairs if pair[1] in names]
    return {"keypoint_names": names, "keypoint_flip_map": flips}


def _check_same(categories: Mapping[str, Categories]) -> None:
    """Refuse sets with different categories: a class of one would be taken for another's."""
    for one, other in itertools.pairwise(categories):
        if categories[one] != categories[other]:
            raise ConfigError(
                f"DATASETS: {one!r} and {other!r} have different categories (id, name): "
                f"{categories[one][:3]} and {categories[other][:3]}, etc.; give both the same"
            )
