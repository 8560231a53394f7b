"""Checks whether a run may start or resume in its folder."""

from __future__ import annotations

import logging
from pathlib import Path

from detectron2.config import CfgNode

from detection.config import load_config
from pcka.engine.config import ConfigError
from pcka.engine.distill import changed_settings
from pcka.engine.run_folder import used_folder

logger = logging.getLogger("detectron2.pcka")

CONFIG, RESULT, CHECKPOINT_TAG = "config.yaml", "result.json", "last_checkpoint"
METRICS = "metrics.json"
# Keys for where a run happens, how long it is, and how it is monitored: they do not affect a step.
MAY_CHANGE = (
    "OUTPUT_DIR", "MODEL.DEVICE", "MODEL.WEIGHTS", "VIS_PERIOD", "CUDNN_BENCHMARK",
    "REPORT",
    "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.CHECKPOINT_PERIOD", "TEST.", "DATASETS.TEST",
    "DATASETS.PROPOSAL_FILES_TEST", "DATASETS.COCO_TEST.", "DATASETS.VOC_TEST.",
    "DATASETS.YOLO_TEST.", "DATASETS.SEMSEG_TEST.", "DATASETS.DIGITS.TEST_IMAGES",
    "DATALOADER.NUM_WORKERS", "DISTILL.LOG_PERIOD", "DISTILL.TEACHER.RANDOM_WEIGHTS",
    "DISTILL.TEACHER.HEAD",
)  # fmt: skip
# Files may be moved while a run is stopped; whether they are the same cannot be checked.
PLACES = (
    "DISTILL.TEACHER.CONFIG_FILE", "DISTILL.TEACHER.WEIGHTS", "DATASETS.COCO_TRAIN.JSON",
    "DATASETS.COCO_TRAIN.IMAGES", "DATASETS.VOC_TRAIN.ROOT", "DATASETS.YOLO_TRAIN.ROOT",
    "DATASETS.SEMSEG_TRAIN.IMAGES", "DATASETS.SEMSEG_TRAIN.LABELS",
    "DATASETS.SEMSEG_TRAIN.CLASSES", "DATASETS.DIGITS.ROOT",
)  # fmt: skip


def traces_of_run(folder: Path) -> list[str]:
    """Return the names of the files that show that a run was trained in a folder."""
    paths = [folder / name for name in (CHECKPOINT_TAG, METRICS, RESULT)]
    # The metrics are created, empty, before the first step, which may fail.
    return [path.name for path in paths if path.exists() and path.stat().st_size]


def check_unused(cfg: CfgNode) -> None:
    """Refuse to start a run in a folder that holds one.

    Raises:
        ConfigError: ``OUTPUT_DIR`` holds a run; the message names its files.
    """
    folder = Path(cfg.OUTPUT_DIR)
    if traces := traces_of_run(folder):
        raise used_folder(folder, traces)


def check_resumed(cfg: CfgNode) -> None:
    """Refuse to resume a run with settings other than those it was started with.

    The training length and the evaluation may change. File locations may change, too, which is
    logged as a warning.

    Args:
        cfg: configuration of the resumed run; its folder is ``OUTPUT_DIR``.

    Raises:
        ConfigError: a setting that the training depends on has changed, or the checkpoint of a
            finished run is missing.
    """
    folder = Path(cfg.OUTPUT_DIR)
    if not (folder / CHECKPOINT_TAG).exists():
        if (folder / RESULT).exists():
            raise ConfigError(
                f"{folder}: a finished run without its checkpoint; to retrain, remove {RESULT}"
            )
        return
    if not (folder / CONFIG).exists():
        logger.warning("%s has no %s: cannot check that its settings match", folder, CONFIG)
        return
    changed = changed_settings(load_config(str(folder / CONFIG), []), cfg)
    if moved := [
        f"{key} {had!r} -> {now!r}" for key, (had, now) in changed.items() if key in PLACES
    ]:
        logger.warning("The run continues with files in other places: %s", ", ".join(moved))
    refused = [
        f"{key} (had {had!r}, now {now!r})"
        for key, (had, now) in changed.items()
        if not key.startswith(MAY_CHANGE) and not key.endswith("_TEST") and key not in PLACES
    ]
    if refused:
        raise ConfigError(
            f"{folder}: this run was started with other values of {', '.join(refused)}; resume it "
            "with its own, or use another OUTPUT_DIR"
        )
