"""Where a teacher comes from: a file, or a training of its own that is kept for the next run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fvcore.common.config import CfgNode

from classification.config import ConfigError, flatten
from classification.data import ImageSet
from classification.defaults import default_config

# What a training by cross-entropy depends on, besides its images.
DETERMINING = ("SEED", "CHANNELS_LAST", "AUTOCAST", "DATA.CROP_PADDING", "DATA.FLIP")
DETERMINING_SECTIONS = ("STUDENT.", "SOLVER.")


def check_teacher(cfg: CfgNode) -> None:
    """Refuse a teacher that has no weights and is not to be trained either."""
    teacher = cfg.TEACHER
    if teacher.NAME and not teacher.WEIGHTS and not teacher.TRAIN:
        raise ConfigError(
            f"TEACHER.WEIGHTS: the teacher {teacher.NAME!r} has no weights; give a checkpoint, or "
            "set TEACHER.TRAIN True to train it first (it is kept in TEACHER.CACHE_DIR)"
        )


def teacher_run(cfg: CfgNode, train_set: ImageSet) -> tuple[CfgNode, Path]:
    """Return the configuration that trains the teacher, and the file for the finished weights.

    The teacher is the "student" of a run by cross-entropy alone. Folder and file are named by
    a hash of all that determines the weights, the training images included.
    """
    run = default_config()
    for key in ("DEVICE", "CHANNELS_LAST", "AUTOCAST", "LOG_EVERY"):
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
