"""Checks that refuse a run before it writes anything."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.utils import comm

import detection.backbones  # noqa: F401  (registers itself)
from detection.config import DISTILLED, load_config, registered, student_architecture
from detection.data.targets import SEGMENTERS
from detection.schedule import POLYNOMIAL, schedule_doubts
from pcka.engine.config import ConfigError, flatten
from pcka.engine.distill import check_methods
from pcka.engine.inherit import check_prefixes

logger = logging.getLogger("detectron2.pcka")

CHOICES = {
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", POLYNOMIAL
    ),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
}  # fmt: skip
LEAST = {
    "SOLVER.MAX_ITER": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.GAMMA": 0,
    "SOLVER.WARMUP_FACTOR": 0,
    "SOLVER.WARMUP_ITERS": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "DISTILL.LOG_PERIOD": 0,  # never
}


def read_run(config_file: str, overrides: list[str]) -> CfgNode:
    """Return a run's configuration, with an available device, checked by :func:`check_run`.

    Args:
        config_file: as in :func:`detection.config.load_config`.
        overrides: likewise.

    Raises:
        ConfigError: see :func:`check_run`; or the overrides name losses, but nothing is distilled.
    """
    cfg = load_config(config_file, overrides)
    cfg.MODEL.DEVICE = usable_device(cfg.MODEL.DEVICE)
    check_run(cfg)
    outer = cfg.MODEL.META_ARCHITECTURE
    # A file may name losses for the files that it is the _BASE_ of.
    if "DISTILL.METHODS" in overrides[::2] and cfg.DISTILL.METHODS and outer != DISTILLED:
        raise ConfigError(
            f"DISTILL.METHODS: has no effect, as {config_file} trains a {outer} without a teacher; "
            f"give a method's file, or set MODEL.META_ARCHITECTURE {DISTILLED} DISTILL.STUDENT "
            f"{outer}"
        )
    return cfg


def check_run(cfg: CfgNode) -> None:
    """Refuse a configuration that would fail later, or whose keys would be ignored.

    Raises:
        ConfigError: the message names a key, and what to set it to.
    """
    if student_architecture(cfg) in SEGMENTERS:
        _check_segmenter(cfg)
    check_methods(cfg.DISTILL.METHODS)
    check_prefixes(cfg.DISTILL.INHERIT)
    registered(BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME, "MODEL.BACKBONE.NAME")
    folder = Path(cfg.OUTPUT_DIR)
    if not cfg.OUTPUT_DIR or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"OUTPUT_DIR: expected a folder to write into, got {cfg.OUTPUT_DIR!r}")
    _check_values(cfg)
    for doubt in schedule_doubts(cfg):
        logger.warning(doubt)
    for key in ("PRECISE_BN", "AUG"):
        if cfg.TEST[key].ENABLED:
            raise ConfigError(f"TEST.{key}.ENABLED: not supported; set it to False")
    if cfg.SOLVER.REFERENCE_WORLD_SIZE not in (0, comm.get_world_size()):
        raise ConfigError(
            "SOLVER.REFERENCE_WORLD_SIZE: batch, learning rate and schedule are not scaled here; "
            f"set it to 0 and give those for {comm.get_world_size()} process(es)"
        )


def _check_segmenter(cfg: CfgNode) -> None:
    keys = cfg.MODEL.SEM_SEG_HEAD
    registered(SEM_SEG_HEADS_REGISTRY, keys.NAME, "MODEL.SEM_SEG_HEAD.NAME")
    images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    if keys.NAME in ("PSPHead", "ASPPHead") and keys.NORM == "BN" and images < 2:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH: {keys.NAME} normalises one mean per image, but each process "
            f"has {images} image(s); give it two, or set MODEL.SEM_SEG_HEAD.NORM to 'SyncBN'"
        )


def usable_device(name: str) -> str:
    """Return ``MODEL.DEVICE``, or ``"cpu"`` if there is no GPU.

    Raises:
        ConfigError: the device is neither the CPU nor a GPU of this machine.
    """
    expected = f"MODEL.DEVICE: expected 'cpu', 'cuda' or 'cuda:<number>', got {name!r}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(expected) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(expected)
    if device.type == "cpu" or not torch.cuda.is_available():
        if device.type == "cuda":
            logger.warning("MODEL.DEVICE: no GPU is available for %r; using the CPU", name)
        return "cpu"
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{expected}; this machine has {torch.cuda.device_count()} GPU(s)")
    return name


def is_taught(cfg: CfgNode) -> bool:
    """Whether a student learns from a teacher."""
    return cfg.MODEL.META_ARCHITECTURE == DISTILLED and bool(cfg.DISTILL.METHODS)


def check_teacher_file(cfg: CfgNode) -> None:
    """Refuse a teacher's file in the student's output folder; warn if both start from one file.

    Raises:
        ConfigError: the file is in ``OUTPUT_DIR``, and would be overwritten.
    """
    if not is_taught(cfg):
        return
    path, folder = Path(cfg.DISTILL.TEACHER.WEIGHTS), Path(cfg.OUTPUT_DIR).resolve()
    if path.is_file() and folder in (path.parent.resolve(), path.resolve().parent):
        raise ConfigError(
            f"DISTILL.TEACHER.WEIGHTS: {str(path)!r} is in OUTPUT_DIR, where the student's files "
            "would overwrite it; use another OUTPUT_DIR"
        )
    if cfg.MODEL.WEIGHTS and cfg.MODEL.WEIGHTS == cfg.DISTILL.TEACHER.WEIGHTS:
        logger.warning(
            "MODEL.WEIGHTS and DISTILL.TEACHER.WEIGHTS are one file, %s: the student starts as its "
            "own teacher and has nothing to learn from it", path,
        )  # fmt: skip


def _check_values(cfg: CfgNode) -> None:
    values: dict[str, Any] = flatten(cfg)
    for key, known in CHOICES.items():
        if values[key] not in known:
            raise ConfigError(f"{key}: expected one of {', '.join(known)}, got {values[key]!r}")
    for key, least in LEAST.items():
        if values[key] < least:
            raise ConfigError(f"{key}: expected at least {least}, got {values[key]}")
    clipped = cfg.SOLVER.CLIP_GRADIENTS
    if clipped.ENABLED and clipped.CLIP_VALUE <= 0:
        raise ConfigError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE: expected a bound above 0, got {clipped.CLIP_VALUE}"
        )
    if not cfg.INPUT.MIN_SIZE_TRAIN:
        raise ConfigError("INPUT.MIN_SIZE_TRAIN: expected one or more sides in pixels, got none")
    batch, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch % processes:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH: {batch} images cannot be split evenly among {processes} "
            f"processes; use {processes * max(1, round(batch / processes))}"
        )
