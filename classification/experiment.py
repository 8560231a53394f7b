"""One run from its configuration to its result: data, teacher, student, training, files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import nn

from classification.config import ConfigError, changed_keys, config_from_text
from classification.data import ImageSet, load_image_sets
from classification.distillation import POOLED, build_losses, pixel_statistics, stage_taps
from classification.environment import choose_device, describe_environment
from classification.evaluation import accuracy
from classification.models import create_model
from classification.random_state import seed_everything
from classification.run_files import RunFiles, read_metrics
from classification.teacher import check_teacher, teacher_run
from classification.trainer import Trainer
from classification.weights import load_classifier
from pcka.analysis.plots import plot_curves
from pcka.checkpoint import atomic_save, load_file
from pcka.distiller import Distiller
from pcka.teacher import FrozenTeacher

logger = logging.getLogger("classification")

ImageSets = tuple[ImageSet, ImageSet]


def run_experiment(
    cfg: CfgNode, *, resume: bool = False, image_sets: ImageSets | None = None
) -> dict[str, object]:
    """Train as configured into OUTPUT_DIR; return the content of ``result.json``.

    Args:
        cfg: as :func:`classification.config.load_config` gives it.
        resume: continue the run in OUTPUT_DIR after its last complete epoch (or start it). A
            finished run is not touched.
        image_sets: training and evaluation images where they are in memory already.

    Raises:
        ConfigError: a run that is there already without ``resume``, or a continuation under
            another configuration.
        ValueError: data, weights or losses that do not go together.
        TrainingFailedError: a loss that is not finite.
    """
    check_teacher(cfg)
    device = choose_device(cfg.DEVICE)
    seed_everything(cfg.SEED)
    losses = build_losses(cfg)
    with RunFiles(cfg.OUTPUT_DIR, resume=resume) as files:
        saved = files.load_checkpoint()
        if saved is not None:
            _check_configuration(cfg, saved)
            if files.result.exists() and saved["epoch"] >= cfg.SOLVER.EPOCHS:
                return json.loads(files.result.read_text())
        train_set, evaluation_set = image_sets or load_image_sets(cfg)
        _check_images(saved, [train_set.fingerprint, evaluation_set.fingerprint])
        files.write_text("config.yaml", cfg.dump())
        files.write_json("environment.json", describe_environment(cfg.SEED, device))

        teacher = _prepare_teacher(cfg, (train_set, evaluation_set))
        seed_everything(cfg.SEED)
        student = _build_student(cfg, len(train_set.classes))
        taps = stage_taps(student, teacher.model) if teacher is not None else {}
        distiller = Distiller(student, teacher, losses, {**taps, **POOLED}).to(device)
        train_set, evaluation_set = train_set.to(device), evaluation_set.to(device)
        teacher_accuracy = _measure_teacher(cfg, distiller, evaluation_set)
        trainer = Trainer(cfg, distiller, taps, train_set, evaluation_set, files)
        if saved is not None:
            trainer.restore(saved)
        files.start_metrics(trainer.epoch)
        trainer.run()
        return _conclude(trainer, teacher_accuracy)


def _check_configuration(cfg: CfgNode, saved: dict) -> None:
    if changed := changed_keys(config_from_text(saved["config"]), cfg):
        raise ConfigError(
            f"OUTPUT_DIR: the run in {cfg.OUTPUT_DIR!r} was started with other values of "
            f"{', '.join(changed)}; continue it with its own (its config.yaml), or choose another "
            "OUTPUT_DIR"
        )


def _check_images(saved: dict | None, fingerprints: list[str]) -> None:
    if saved is not None and saved["images"] != fingerprints:
        raise ConfigError(
            "DATA.ROOT: the images are not those that the run was started with; give the folder "
            "that holds them, or choose another OUTPUT_DIR"
        )


def _prepare_teacher(cfg: CfgNode, image_sets: ImageSets) -> FrozenTeacher | None:
    """Return the teacher with its weights, trained first where that is asked for."""
    if not cfg.TEACHER.NAME:
        return None
    weights = cfg.TEACHER.WEIGHTS or _trained_teacher(cfg, image_sets)
    classes = len(image_sets[0].classes)
    model = load_classifier(cfg.TEACHER.NAME, weights, classes, role="teacher")
    return FrozenTeacher(model, channels_last=cfg.CHANNELS_LAST)


def _trained_teacher(cfg: CfgNode, image_sets: ImageSets) -> Path:
    """Return the file of the finished teacher; train it, or go on training it, if there is none."""
    run, weights = teacher_run(cfg, image_sets[0])
    if weights.exists():
        logger.info("teacher %s: trained before, %s", cfg.TEACHER.NAME, weights)
    else:
        logger.info("teacher %s: training it in %s", cfg.TEACHER.NAME, run.OUTPUT_DIR)
        run_experiment(run, resume=True, image_sets=image_sets)
        atomic_save(load_file(Path(run.OUTPUT_DIR) / "model_last.pth"), weights)
    return weights


def _build_student(cfg: CfgNode, classes: int) -> nn.Module:
    name, weights = cfg.STUDENT.NAME, cfg.STUDENT.WEIGHTS
    if weights:
        student = load_classifier(name, weights, classes, role="student")
    else:
        student = create_model(name, classes)
    layout = torch.channels_last if cfg.CHANNELS_LAST else torch.contiguous_format
    return student.to(memory_format=layout)


def _measure_teacher(cfg: CfgNode, distiller: Distiller, data: ImageSet) -> float | None:
    if distiller.teacher is None:
        return None
    pixels = pixel_statistics(cfg.TEACHER).to(data.images.device)
    top1 = accuracy(distiller.teacher, pixels, data)["top1"]
    logger.info("teacher %s: accuracy %.2f %%", cfg.TEACHER.NAME, top1)
    return top1


def _conclude(trainer: Trainer, teacher_accuracy: float | None) -> dict[str, object]:
    """Write what the run came to."""
    cfg, files = trainer.cfg, trainer.files
    metrics = read_metrics(files.metrics)
    plot_curves(metrics, files.directory / "curves.png")
    result = {
        "methods": list(cfg.DISTILL.METHODS),
        "student": cfg.STUDENT.NAME,
        "teacher": cfg.TEACHER.NAME or None,
        "teacher_accuracy": teacher_accuracy,
        "last_accuracy": metrics[-1]["accuracy"],
        **trainer.best,
        "epochs": trainer.epoch,
        "seconds": trainer.seconds,
        "training_images": len(trainer.train_set),
        "evaluation_images": len(trainer.evaluation_set),
    }
    files.write_json("result.json", result)
    logger.info(
        "finished: accuracy %.2f %% after the last epoch, %.2f %% after the best (epoch %d)",
        *(result["last_accuracy"], result["best_accuracy"], result["best_epoch"]),
    )
    return result
