"""Train a detector: ``python detection/train_net.py --config-file F [KEY VALUE ...]``."""

from __future__ import annotations

import detection  # answers --help before the slow imports

# isort: split

import argparse
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer  # noqa: F401  (registers its paths)
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm

import detection.meta_arch  # noqa: F401  (registers itself)
from detection.arguments import train_parser
from detection.checkpoint import load_weights
from detection.config import build_student, load_config
from detection.data import register_datasets
from detection.data.targets import check_test_sets, first_test_set
from detection.evaluation import evaluate
from detection.launch import run
from detection.preflight import check_teacher_file, read_run, usable_device
from detection.settings import RESULT, check_resumed, check_unused
from detection.trainer import DetectionTrainer
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.environment import ENVIRONMENT, describe_environment
from pcka.engine.folder_lock import lock_folder
from pcka.engine.run_folder import remove_temporaries, write_text

logger = logging.getLogger("detectron2.pcka")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train or evaluate as given by the arguments; return the metrics by task."""
    given = train_parser().parse_intermixed_args(arguments)
    if not given.config_file:
        raise ConfigError("--config-file: expected a YAML file, got none")
    device = usable_device(load_config(given.config_file, given.opts).MODEL.DEVICE)
    return run(_work, given, on_gpus=device != "cpu")


def configure(arguments: argparse.Namespace) -> CfgNode:
    """Return the frozen configuration of a run, with its data sets registered."""
    cfg = read_run(arguments.config_file, arguments.opts)
    if arguments.eval_only:  # leave the run's files untouched
        cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, "evaluation"))
    else:
        check_teacher_file(cfg)
    register_datasets(cfg, training=not arguments.eval_only)
    cfg.freeze()
    return cfg


def _work(arguments: argparse.Namespace) -> dict[str, Any]:
    cfg = configure(arguments)
    with _held(Path(cfg.OUTPUT_DIR)):
        if comm.is_main_process() and not arguments.eval_only:
            (check_resumed if arguments.resume else check_unused)(cfg)
        default_setup(cfg, arguments)
        if arguments.eval_only:
            results = _evaluate_only(cfg)
        else:
            trainer = DetectionTrainer(cfg, resume=arguments.resume)
            if comm.is_main_process():
                _write_environment(cfg)
            results = trainer.train_all()
        if comm.is_main_process():
            write_result(results, Path(cfg.OUTPUT_DIR, RESULT))
            if cfg.REPORT and not arguments.eval_only:
                _write_report(Path(cfg.OUTPUT_DIR))
    return results


def _write_environment(cfg: CfgNode) -> None:
    found = describe_environment(cfg.SEED, torch.device(cfg.MODEL.DEVICE))
    write_text(Path(cfg.OUTPUT_DIR, ENVIRONMENT), json.dumps(found, indent=2))


def _write_report(folder: Path) -> None:
    from detection.report import make_report  # imports modules that no training needs
    from pcka.engine.report import attempt

    again = f"python detection/report.py {folder}"
    attempt(lambda: make_report(folder), folder, logger, again)


def write_result(results: dict[str, Any], path: Path) -> None:
    """Write metrics as JSON, which has no NaN: metrics that could not be computed are null."""
    write_text(path, json.dumps(_without_nan(results), indent=1, allow_nan=False))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    return None if math.isnan(value) else value


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep any second run out of the folder; the main process holds the lock for all."""
    if not comm.is_main_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = lock_folder(folder)
    try:
        remove_temporaries(folder)
        yield
    finally:
        os.close(handle)


def _evaluate_only(cfg: CfgNode) -> dict[str, Any]:
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS: --eval-only needs the file to evaluate, got ''")
    first = first_test_set(cfg)  # the set that is drawn if there are several
    check_test_sets(cfg)
    student = build_student(cfg).to(cfg.MODEL.DEVICE)
    load_weights(student, cfg.MODEL.WEIGHTS)
    results = evaluate(cfg, student)
    if "bbox" in (results if len(cfg.DATASETS.TEST) == 1 else results.get(first, {})):
        from detection.pictures import draw_found  # imports matplotlib

        draw_found(cfg, {"found": student}, Path(cfg.OUTPUT_DIR, "detections.png"))
    return results


if __name__ == "__main__":
    run_command(
        main, interrupted="repeat the command with --resume to continue after the last checkpoint"
    )
