"""Where a teacher comes from: a file, or a training of its own that is kept for the next run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import Tensor

from classification.config import ConfigError
from classification.data import ImageSet
from classification.defaults import default_config
from classification.distillation import pixel_statistics
from classification.evaluation import accuracy
from classification.models import Classifier
from classification.run_files import remove_temporaries
from classification.weights import load_classifier
from classification.yaml_files import flatten
from pcka.checkpoint import atomic_save, load_file
from pcka.distributed import from_first_process, rank, world_size
from pcka.folder_lock import FolderInUseError, lock_folder
from pcka.teacher import FrozenTeacher

logger = logging.getLogger("classification")

PREFLIGHT_POINTS = 2.0  # how far a teacher may stay under the accuracy that its config states
WAITING_SECONDS = 2.0  # between two looks at whether another run has trained the teacher

ImageSets = tuple[ImageSet, ImageSet]

# What a training by cross-entropy depends on, besides its images.
DETERMINING = ("SEED", "CHANNELS_LAST", "AUTOCAST", "DATA.CROP_PADDING", "DATA.FLIP")
DETERMINING_SECTIONS = ("STUDENT.", "SOLVER.")


@dataclass(frozen=True)
class Teacher:
    """A teacher that is ready to teach.

    Attributes:
        model: on the device that trains, its batch norms folded.
        accuracy: on the evaluation images, percent.
        norms: module path -> weight and bias of the batch norms that give features before their
            activation, as they were before the folding.
    """

    model: FrozenTeacher
    accuracy: float
    norms: dict[str, tuple[Tensor, Tensor]]


def prepare_teacher(
    cfg: CfgNode,
    image_sets: ImageSets,
    train_run: Callable[[CfgNode, ImageSets], Path],
    tapped: Collection[str] = (),
) -> Teacher | None:
    """Return the teacher with its weights, or None where the configuration names none.

    Args:
        cfg: of the students.
        image_sets: training and evaluation images, on the device that trains.
        train_run: trains the teacher's own run where one is asked for and not there yet, and
            returns the file of its weights.
        tapped: paths in the teacher that are read beside its stages.

    Raises:
        ConfigError: a teacher without weights, or one that is more than two points less accurate
            than ``TEACHER.ACCURACY`` says.
    """
    if not cfg.TEACHER.NAME:
        return None
    train_set, evaluation_set = image_sets
    weights = cfg.TEACHER.WEIGHTS or _trained_teacher(cfg, image_sets, train_run)
    model = load_classifier(cfg.TEACHER.NAME, weights, len(train_set.classes), role="teacher")
    model.to(evaluation_set.device)
    norms = _preactivation_norms(model)
    stages = (*model.stage_names, *model.preactivation_names)
    frozen = FrozenTeacher(
        model,
        channels_last=cfg.CHANNELS_LAST,
        fold_batch_norm=True,
        tapped=[path for path in (*stages, *tapped) if path],
    )
    pixels = pixel_statistics(cfg.TEACHER).to(evaluation_set.device)
    top1 = accuracy(frozen, pixels, evaluation_set)["top1"]
    logger.info("teacher %s: accuracy %.2f %%", cfg.TEACHER.NAME, top1)
    _preflight(cfg, top1)
    return Teacher(frozen, top1, norms)


def _preactivation_norms(model: Classifier) -> dict[str, tuple[Tensor, Tensor]]:
    norms: dict[str, tuple[Tensor, Tensor]] = {}
    for path in filter(None, model.preactivation_norms):
        norm: Any = model.get_submodule(path)
        norms[path] = norm.weight.detach(), norm.bias.detach()
    return norms


def _preflight(cfg: CfgNode, top1: float) -> None:
    stated = cfg.TEACHER.ACCURACY
    if top1 < stated - PREFLIGHT_POINTS:
        raise ConfigError(
            f"TEACHER.ACCURACY: {cfg.TEACHER.NAME} reaches {top1:.2f} % on the evaluation images, "
            f"{stated:.2f} % is stated; check TEACHER.WEIGHTS, TEACHER.PIXEL_MEAN and PIXEL_STD, "
            "and that the data are what it was trained for, or state its accuracy on these (0: "
            "any)"
        )


def _trained_teacher(
    cfg: CfgNode, image_sets: ImageSets, train_run: Callable[[CfgNode, ImageSets], Path]
) -> Path:
    """Return the file of the finished teacher; train it, or go on training it, if there is none.

    Of several runs that need the same teacher one trains it, and the others wait.
    """
    run, weights = teacher_run(cfg, image_sets[0])
    folder = Path(run.OUTPUT_DIR)
    if from_first_process(weights.exists()):
        logger.info("teacher %s: trained before, %s", cfg.TEACHER.NAME, weights)
    told = False
    while not from_first_process(weights.exists()):
        if from_first_process(rank() == 0 and _is_in_use(folder)):
            if not told:
                logger.info("teacher %s: another run trains it in %s", cfg.TEACHER.NAME, folder)
            told = True
            time.sleep(WAITING_SECONDS)
            continue
        logger.info("teacher %s: training it in %s", cfg.TEACHER.NAME, folder)
        try:
            trained = train_run(run, image_sets)
        except FolderInUseError:
            if world_size() > 1:  # the first process alone knows
                raise
            continue  # another run was quicker
        if rank() == 0:
            _keep(trained, weights)
    return weights


def _is_in_use(folder: Path) -> bool:
    try:
        os.close(lock_folder(folder))
    except FileNotFoundError:
        return False
    except FolderInUseError:
        return True
    return False


def _keep(trained: Path, weights: Path) -> None:
    """Copy the weights of a finished training to where runs look for them."""
    with suppress(FolderInUseError):  # another run is just doing the same
        handle = lock_folder(trained.parent)
        try:
            remove_temporaries(weights.parent, weights.name)
            atomic_save(load_file(trained), weights)
        except FileNotFoundError as error:
            raise ConfigError(
                f"TEACHER.CACHE_DIR: the finished training of the teacher has lost its {trained}; "
                f"remove {str(trained.parent)!r} to train it anew"
            ) from error
        finally:
            os.close(handle)


def check_teacher(cfg: CfgNode) -> None:
    """Refuse a teacher that is not there and is not to be trained either."""
    teacher = cfg.TEACHER
    if teacher.NAME and not teacher.WEIGHTS and not teacher.TRAIN:
        raise ConfigError(
            f"TEACHER.WEIGHTS: the teacher {teacher.NAME!r} has no weights; give a checkpoint, or "
            "set TEACHER.TRAIN True to train it first (it is kept in TEACHER.CACHE_DIR)"
        )
    if teacher.NAME and teacher.WEIGHTS and not Path(teacher.WEIGHTS).is_file():
        raise ConfigError(f"TEACHER.WEIGHTS: there is no file {teacher.WEIGHTS!r}")


def teacher_run(cfg: CfgNode, train_set: ImageSet) -> tuple[CfgNode, Path]:
    """Return the configuration that trains the teacher, and the file for the finished weights.

    The teacher is the "student" of a run by cross-entropy alone. Folder and file are named by
    a hash of all that determines the weights, the training images included.
    """
    run = default_config()
    for key in ("DEVICE", "CHANNELS_LAST", "AUTOCAST", "CUDA_GRAPH", "LOG_EVERY", "SAVE_EVERY"):
        run[key] = cfg[key]
    run.SEED = cfg.TEACHER.SEED
    run.DATA = cfg.DATA.clone()
    run.SOLVER = cfg.SOLVER.clone()
    run.defrost()
    run.SOLVER.EPOCHS = cfg.TEACHER.EPOCHS
    for key in ("NAME", "PIXEL_MEAN", "PIXEL_STD"):
        run.STUDENT[key] = cfg.TEACHER[key]
    determining = {
        key: value
        for key, value in flatten(run).items()
        if key in DETERMINING or key.startswith(DETERMINING_SECTIONS)
    }
    text = json.dumps([determining, train_set.fingerprint], sort_keys=True)
    name = f"{cfg.TEACHER.NAME}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    run.OUTPUT_DIR = str(Path(cfg.TEACHER.CACHE_DIR) / name)
    run.freeze()
    return run, Path(cfg.TEACHER.CACHE_DIR) / f"{name}.pth"
