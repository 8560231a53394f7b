"""The configuration keys that distillation adds to detectron2's."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from fvcore.common.registry import Registry
from torch import nn

from detection.architectures import MODULES, import_architecture
from detection.config_node import ConfigNode
from pcka.engine import distill
from pcka.engine.config import PER_STAGE, ConfigError, flatten, pairs_of, unknown_key

COMMAND_LINE = "the command line"
OPTS = "DISTILL.TEACHER.OPTS"
T = TypeVar("T")
MODEL_ZOO = "model_zoo"
NO_MAPPING = "it, or its _BASE_, holds no keys with values such as 'SEED: 0'"
DISTILLED = "DistilledDetector"  # the meta-architecture in detection/meta_arch.py
PROJECT = Path(__file__).parents[1]


def detection_config() -> CfgNode:
    """Return detectron2's defaults plus this project's keys.

    ``DISTILL.<NAME>``, the section of a loss's keywords, is added once the loss is named; see
    :mod:`pcka.engine.distill`.
    """
    cfg = get_cfg()
    cfg.IMPORTS = []  # modules to import that register your own parts
    cfg.REPORT = True  # write report.html and report.json at the end of a run
    cfg.DATASETS.COCO_TRAIN = CfgNode(
        {
            "NAME": "",  # name to register the set under; "": no such set
            "JSON": "",  # annotations in COCO format; the set replaces DATASETS.TRAIN
            "IMAGES": "",  # folder of its images
        }
    )
    cfg.DATASETS.COCO_TEST = CfgNode(
        {
            "NAME": "",  # name to register the set under; "": no such set
            "JSON": "",  # annotations to evaluate on; the set replaces DATASETS.TEST
            "IMAGES": "",  # folder of its images
        }
    )
    cfg.DATASETS.VOC_TRAIN = CfgNode(
        {
            "NAME": "",  # name to register the set under; "": no such set
            "ROOT": "",  # folder that holds Annotations, JPEGImages and ImageSets
            "SPLIT": "train",  # name of the list in ImageSets/Main
        }
    )
    cfg.DATASETS.VOC_TEST = CfgNode(
        {
            "NAME": "",  # name to register the set under; "": no such set
            "ROOT": "",  # folder that holds Annotations, JPEGImages and ImageSets
            "SPLIT": "val",  # name of the list in ImageSets/Main
        }
    )
    cfg.DATASETS.YOLO_TRAIN = CfgNode(
        {
            "NAME": "",  # name to register the set under; "": no such set
            "ROOT": "",  # folder that holds images and labels, or its data.yaml
            "SPLIT": "train",  # the split to train on
        }
    )
    cfg.DATASETS.YOLO_TEST = CfgNode(
        {
            "NAME": "",  # name to register the set under; "": no such set
            "ROOT": "",  # folder that holds images and labels, or its data.yaml
            "SPLIT": "val",  # the split to evaluate on
        }
    )
    cfg.DATASETS.SEMSEG_TRAIN = CfgNode(
        {
            "NAME": "",  # name to register the set under; "": no such set
            "IMAGES": "",  # folder of its images
            "LABELS": "",  # folder of label images: one PNG per image, whose pixels hold classes
            "CLASSES": "",  # file of class names, one per line; "": the names are numbers
        }
    )
    cfg.DATASETS.SEMSEG_TEST = CfgNode(
        {
            "NAME": "",  # name to register the set under; "": no such set
            "IMAGES": "",  # folder of its images
            "LABELS": "",  # folder of label images: one PNG per image, whose pixels hold classes
            "CLASSES": "",  # file of class names, one per line; "": the names are numbers
        }
    )
    cfg.DATASETS.DIGITS = CfgNode(
        {
            "ROOT": "output/digits_scenes",  # folder for the scenes of handwritten digits
            "SIDE": 512,  # side of a scene, in pixels
            "TRAIN_IMAGES": 150,  # scenes to train on
            "TEST_IMAGES": 40,  # scenes to evaluate on
        }
    )
    cfg.MODEL.FPN.P6P7 = CfgNode(
        {
            "IN_FEATURE": "res5",  # build_p6p7_resnet_fpn_backbone: the map that P6 is made from
            "RELU": True,  # same backbone: apply a ReLU between P6 and P7
        }
    )
    cfg.MODEL.FCOS = CfgNode(
        {
            "NUM_CLASSES": 80,  # number of classes, excluding background
            "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],  # levels that the head runs on
            "NUM_CONVS": 4,  # convolutions in each branch of the head
            "NORM": "GN",  # norm of these convolutions; "": none
            "PRIOR_PROB": 0.01,  # initial probability of an object at a location
            "CENTER_SAMPLING_RADIUS": 1.5,  # radius of a box's central region, in strides
            "FOCAL_LOSS_ALPHA": 0.25,  # weight of objects relative to background
            "FOCAL_LOSS_GAMMA": 2.0,  # focusing parameter; larger values weigh easy locations less
            "SCORE_THRESH_TEST": 0.2,  # minimum score of a detection
            "NMS_THRESH_TEST": 0.6,  # IoU above which the lower-scoring of two boxes is dropped
            "TOPK_CANDIDATES_TEST": 1000,  # detections kept per level before NMS
        }
    )
    cfg.MODEL.GFL = CfgNode(
        {
            "NUM_CLASSES": 80,  # number of classes, excluding background
            "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],  # levels that the head runs on
            "NUM_CONVS": 4,  # convolutions in each branch of the head
            "NORM": "GN",  # norm of these convolutions; "": none
            "PRIOR_PROB": 0.01,  # initial probability of an object at a location
            "REG_MAX": 16,  # largest distance from a point to an edge, in strides
            "ANCHOR_SCALE": 8.0,  # side of the squares that ATSS compares with boxes, in strides
            "ATSS_TOPK": 9,  # candidate points per object and level
            "QUALITY_BETA": 2.0,  # larger values weigh locations with accurate scores less
            "BOX_WEIGHT": 2.0,  # weight of the box loss
            "EDGE_WEIGHT": 0.25,  # weight of the distribution focal loss
            "SCORE_THRESH_TEST": 0.05,  # minimum score of a detection
            "NMS_THRESH_TEST": 0.6,  # IoU above which the lower-scoring of two boxes is dropped
            "TOPK_CANDIDATES_TEST": 1000,  # detections kept per level before NMS
        }
    )
    cfg.MODEL.REPPOINTS = CfgNode(
        {
            "NUM_CLASSES": 80,  # number of classes, excluding background
            "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],  # levels that the head runs on
            "NUM_CONVS": 3,  # convolutions in each branch of the head
            "NORM": "GN",  # norm of these convolutions; "": none
            "PRIOR_PROB": 0.01,  # initial probability of an object at a location
            "NUM_POINTS": 9,  # points per object; the square of an odd number
            "TRANSFORM": "moment",  # from points to box: "moment" or "minmax"
            "FIRST_WEIGHT": 0.5,  # weight of the loss on the first points
            "BOX_WEIGHT": 1.0,  # weight of the loss on the refined points
            "FOCAL_LOSS_ALPHA": 0.25,  # weight of objects relative to background
            "FOCAL_LOSS_GAMMA": 2.0,  # focusing parameter; larger values weigh easy locations less
            "SCORE_THRESH_TEST": 0.05,  # minimum score of a detection
            "NMS_THRESH_TEST": 0.5,  # IoU above which the lower-scoring of two boxes is dropped
            "TOPK_CANDIDATES_TEST": 1000,  # detections kept per level before NMS
        }
    )
    cfg.DISTILL = CfgNode(
        {
            "STUDENT": "",  # meta-architecture of the student; MODEL.* describes it
            "METHODS": ["PCKA"],  # the losses that are summed
            "LEVELS": [],  # "p3" or "p3:p2" (student:teacher); [] means the first four
            "INHERIT": [],  # prefixes of the teacher's weights that the student starts from
            "LOG_PERIOD": 20,  # steps between logs of the levels' alignments and gradients; 0: none
            "TEACHER": {
                "CONFIG_FILE": "",  # a file, or a name in detectron2's model zoo
                "OPTS": [],  # KEY VALUE pairs that override that file's
                "WEIGHTS": "",  # a file or URL; "model_zoo": the zoo's weights for CONFIG_FILE
                "HEAD": False,  # build its head even if no method needs it, and test it first
                "RANDOM_WEIGHTS": False,  # allow an untrained teacher (tests, timings)
                "AUTOCAST": "",  # dtype of its forward: "bfloat16", "float32"; "": the student's
                "CHANNELS_LAST": False,  # run it in channels_last memory format
            },
        }
    )
    return ConfigNode(cfg)


def section_defaults(name: str) -> dict[str, object]:
    """Key -> default of a loss's section; an empty ``STAGES`` means all of ``DISTILL.LEVELS``."""
    # A single value applies to any number of levels.
    keywords = {
        key: value[:1] if key in PER_STAGE and isinstance(value, list) else value
        for key, value in distill.section_defaults(name).items()
    }
    if "STAGES" in keywords:
        keywords["STAGES"] = []
    if name == "FITNET":
        keywords["REGRESSOR"] = False  # the distiller's adapters already match the maps' shapes
    return keywords


def load_config(config_file: str, overrides: list[str]) -> CfgNode:
    """Return the configuration: defaults, the file (and its ``_BASE_``), overrides.

    Args:
        config_file: YAML file of plain values; tags that would run code are refused.
        overrides: ``KEY VALUE ...`` from the command line.

    Raises:
        ConfigError: an unreadable file, an unknown or duplicate key, or a value of the wrong type.
    """
    cfg = detection_config()
    merge(cfg, config_file, overrides)
    return cfg


def merge(
    cfg: CfgNode,
    config_file: str,
    overrides: list[str],
    source: str = COMMAND_LINE,
    *,
    trusted: bool = False,
) -> None:
    """Merge a file and overrides, which come from ``source``; see :func:`load_config`."""
    if config_file.endswith(".py"):
        raise ConfigError(f"{config_file}: a detectron2 LazyConfig; a YAML file is needed")
    known = cfg.DISTILL.clone()
    cfg.DISTILL.set_new_allowed(True)  # accepted unchecked here, merged with checks below
    try:
        cfg.merge_from_file(config_file, allow_unsafe=trusted)
    except RecursionError as error:
        raise ConfigError(f"{config_file}: its _BASE_ leads back to itself; remove it") from error
    except AttributeError as error:
        raise ConfigError(f"{config_file}: {NO_MAPPING}") from error
    except FileNotFoundError as error:
        raise ConfigError(
            f"{config_file}: its _BASE_ names {error.filename!r}, which does not exist; the path "
            "is relative to the file that names it (base files are in "
            f"{PROJECT / 'configs' / 'detection'})"
        ) from error
    except (KeyError, AssertionError, ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{config_file}: {_reason(error)}") from error
    of_file, cfg.DISTILL = {"IMPORTS": cfg.IMPORTS, **flatten(cfg.DISTILL, "DISTILL.")}, known
    distill.merge_settings(cfg, of_file, config_file, section_defaults)
    _merge_overrides(cfg, dict(pairs_of(overrides, source)), source)
    for name in (cfg.MODEL.META_ARCHITECTURE, cfg.DISTILL.STUDENT):
        import_architecture(name)


def _merge_overrides(cfg: CfgNode, given: Mapping[str, object], source: str) -> None:
    known, own, others = flatten(cfg), {}, CfgNode()
    for key, value in given.items():
        if key == "IMPORTS" or key.startswith("DISTILL."):
            own[key] = value
            continue
        if key not in known:
            raise unknown_key(key, known, source)
        *sections, leaf = key.split(".")
        reduce(lambda node, name: node.setdefault(name, CfgNode()), sections, others)[leaf] = value
    try:
        cfg.merge_from_other_cfg(others)
    except ValueError as error:
        raise ConfigError(f"{source}: {_reason(error)}") from error
    distill.merge_settings(cfg, own, source, section_defaults)


def _reason(error: Exception) -> object:
    """The reason of an error while merging, in one line."""
    text = str(error)
    if isinstance(error, yaml.YAMLError):
        return " ".join(text.split())
    if isinstance(error, TypeError) and "is not iterable" in text:  # an empty file, a number
        return NO_MAPPING
    if section := re.search(r"\n.* for config key: (\S+)$", text, re.DOTALL):
        return f"{section[1]}: expected a section of keys, or another type of value"
    if types := re.search(r"\(<class '(\w+)'> .* with values \((.*) vs\. (.*)\) .* (\S+)$", text):
        kind, default, value, key = types.groups()
        return f"{key} expects a {kind} (default {default}), got {value}"
    return error.args[0] if isinstance(error, KeyError) else error


def teacher_config(cfg: CfgNode) -> CfgNode:
    """Return the teacher's own configuration, from ``DISTILL.TEACHER``.

    Raises:
        ConfigError: there is no such file, or no weights are given.
    """
    wanted = cfg.DISTILL.TEACHER
    # Paths of this project's own files work from any working directory.
    paths = [Path(wanted.CONFIG_FILE), PROJECT / wanted.CONFIG_FILE]
    path = next((path for path in paths if path.is_file()), None)
    teacher = detection_config()
    file = _zoo_file(wanted.CONFIG_FILE) if path is None else str(path)
    merge(teacher, file, wanted.OPTS, OPTS, trusted=path is None)
    teacher.MODEL.WEIGHTS = _teacher_weights(wanted)
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    return teacher


def student_architecture(cfg: CfgNode) -> str:
    """Return the name of the student's meta-architecture, whether wrapped for distillation or not.

    Raises:
        ConfigError: it is missing or unknown to detectron2, or ``DISTILL.STUDENT`` is set without
            distillation.
    """
    outer, student = cfg.MODEL.META_ARCHITECTURE, cfg.DISTILL.STUDENT
    if outer == DISTILLED:
        if student in ("", DISTILLED):
            raise ConfigError(
                f"DISTILL.STUDENT: expected a meta-architecture, e.g. 'RetinaNet', got {student!r}"
            )
        _known_architecture(student, "DISTILL.STUDENT")
        return student
    if student:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE: {outer!r} would train without DISTILL; set it to "
            f"{DISTILLED!r}, or leave DISTILL.STUDENT ({student!r}) empty"
        )
    _known_architecture(outer, "MODEL.META_ARCHITECTURE")
    return outer


def _known_architecture(name: str, key: str) -> None:
    # For an unknown name, import all of this project's own, so that the message lists them too.
    for own in [name] if name in META_ARCH_REGISTRY or name in MODULES else MODULES:
        import_architecture(own)
    registered(META_ARCH_REGISTRY, name, key)


def registered(registry: Registry, name: str, key: str) -> Callable[..., Any]:
    """Return what is registered with detectron2 under a name.

    Raises:
        ConfigError: there is no such name; the message starts with ``key``, which gave it.
    """
    if name not in registry:
        known = ", ".join(sorted(entry for entry, _ in registry))
        raise ConfigError(f"{key}: unknown {name!r}; registered: {known}")
    return registry.get(name)


def build_student(cfg: CfgNode, key: str = "MODEL") -> nn.Module:
    """Return the plain detectron2 detector that ``MODEL`` describes, without any wrapper.

    Raises:
        ConfigError: see :func:`student_architecture` and :func:`build`.
    """
    return build(META_ARCH_REGISTRY.get(student_architecture(cfg)), cfg, key)


def build(create: Callable[[CfgNode], T], cfg: CfgNode, key: str) -> T:
    """Return what ``create`` builds from a configuration.

    Raises:
        ConfigError: its keys are inconsistent; ``key`` is the section to check.
    """
    try:
        return create(cfg)
    except ConfigError:
        raise
    except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{key}: cannot be built from its keys: {type(error).__name__}: {error} "
            f"({Path(frame.filename).name}, line {frame.lineno}: {frame.line})"
        ) from error


def _zoo_file(name: str) -> str:
    try:
        path = model_zoo.get_config_file(name)
    except RuntimeError:
        path = ""
    if not Path(path).is_file():  # it may be the zoo's folder itself
        raise ConfigError(
            f"DISTILL.TEACHER.CONFIG_FILE: {name!r} is neither a file nor a name in detectron2's "
            "model zoo, such as 'COCO-Detection/retinanet_R_101_FPN_3x.yaml'"
        )
    return path


def _teacher_weights(wanted: CfgNode) -> str:
    if wanted.WEIGHTS == MODEL_ZOO:
        try:
            return model_zoo.get_checkpoint_url(wanted.CONFIG_FILE)
        except RuntimeError as error:
            raise ConfigError(
                f"DISTILL.TEACHER.WEIGHTS: the model zoo has none for {wanted.CONFIG_FILE!r}; "
                "give a file or URL"
            ) from error
    if wanted.WEIGHTS == "" and not wanted.RANDOM_WEIGHTS:
        raise ConfigError(
            "DISTILL.TEACHER.WEIGHTS: expected a file, a URL or 'model_zoo', got ''; for an "
            "untrained teacher, set DISTILL.TEACHER.RANDOM_WEIGHTS True"
        )
    return wanted.WEIGHTS
