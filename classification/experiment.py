"""Runs from their configurations to their results: data, teacher, students, training, files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from fvcore.common.config import CfgNode

from classification.config import ConfigError, changed_keys, load_config
from classification.data import ImageSet, load_image_sets
from classification.distillation import (
    Taps,
    build_losses,
    check_losses,
    extra_taps,
    loss_context,
    model_taps,
    numbered_stages,
)
from classification.environment import describe_environment
from classification.launch import process_group
from classification.loop import train
from classification.models import Classifier, create_model
from classification.preflight import naming, prepare_distiller
from classification.random_state import seed_everything
from classification.run_files import CHECKPOINT, RunFiles, read_metrics
from classification.saved_state import check_fits, saved_config
from classification.solver import unreached_milestones
from classification.teacher import Teacher, check_teacher, prepare_teacher
from classification.trainer import Trainer, TrainingFailedError
from classification.weights import load_classifier
from classification.yaml_files import flatten
from pcka.analysis.layerwise import MIN_SAMPLES
from pcka.analysis.plots import plot_curves
from pcka.distiller import Distiller
from pcka.distributed import from_first_process, rank

ImageSets = tuple[ImageSet, ImageSet]
Result = dict[str, object]

OWN_KEYS = ("SEED", "STUDENT.", "DISTILL.", "OUTPUT_DIR")  # of each run side by side


def run_experiment(
    cfg: CfgNode, *, resume: bool = False, image_sets: ImageSets | None = None
) -> Result:
    """Train as configured into OUTPUT_DIR; return the content of ``result.json``.

    Under ``torchrun`` all processes train together, and the first one alone writes.

    Args:
        cfg: as :func:`classification.config.load_config` gives it.
        resume: continue the run in OUTPUT_DIR after its last complete epoch (or start it). A
            finished run is not touched.
        image_sets: training and evaluation images where they are in memory already.

    Raises:
        ConfigError: a run that is there already without ``resume``, a continuation under another
            configuration, or data, weights or losses that do not go together.
        TrainingFailedError: a loss that is not finite.
    """
    (result,) = run_side_by_side([cfg], resume=resume, image_sets=image_sets)
    if isinstance(result, TrainingFailedError):
        raise result
    return result


def run_side_by_side(
    cfgs: Sequence[CfgNode], *, resume: bool = False, image_sets: ImageSets | None = None
) -> list[Result | TrainingFailedError]:
    """Train several students on one teacher as :func:`run_experiment` would train each alone.

    For all runs of one seed the batches are made once and the teacher runs once, which is much
    faster than one after the other; on a GPU all students are trained at the same time.

    Args:
        cfgs: configurations that differ in :data:`OWN_KEYS` only.
        resume: as in :func:`run_experiment`, for each run.
        image_sets: likewise.

    Returns:
        The result of each run, or why it failed.
    """
    lead = cfgs[0]
    _check_alike(cfgs)
    check_teacher(lead)
    for weights in {cfg.STUDENT.WEIGHTS for cfg in cfgs} - {""}:
        if not Path(weights).is_file():
            raise ConfigError(f"STUDENT.WEIGHTS: there is no file {weights!r}")
    for cfg in cfgs:
        check_losses(cfg)
    with process_group(lead.DEVICE) as device, ExitStack() as stack:
        runs = [_open_run(cfg, resume, stack) for cfg in cfgs]
        missing = [run for run in runs if run.result is None]
        if missing:
            train(_prepare(missing, device, image_sets))
        return [run.conclude() for run in runs]


def prepare_trainers(
    cfgs: Sequence[CfgNode], device: torch.device, image_sets: ImageSets | None = None
) -> list[Trainer]:
    """Return what would train each student from its start, without files.

    Args:
        cfgs: as for :func:`run_side_by_side`.
        device: that trains.
        image_sets: training and evaluation images where they are in memory already.
    """
    return _prepare([_Run(cfg, None, None, None) for cfg in cfgs], device, image_sets)


def _prepare(
    runs: Sequence[_Run], device: torch.device, image_sets: ImageSets | None
) -> list[Trainer]:
    lead = runs[0].cfg
    train_set, evaluation_set = image_sets or _load_image_sets(lead)
    sets = train_set.to(device), evaluation_set.to(device)
    teacher = prepare_teacher(lead, sets, _train_teacher, _tapped([run.cfg for run in runs]))
    return [run.prepare(sets, teacher, device) for run in runs]


def _tapped(cfgs: Sequence[CfgNode]) -> set[str]:
    """What ``DISTILL.TAPS`` reads in the teacher."""
    taps = (extra_taps(cfg.DISTILL.TAPS) for cfg in cfgs)
    return {path for by_name in taps for _, path in by_name.values()}


@dataclass
class _Run:
    """One student's run, from its folder to its result.

    Attributes:
        cfg: its configuration.
        files: None in all processes but the first.
        saved: the state to go on from.
        result: where the run was finished before.
        teacher_accuracy: percent.
        trainer: once it is prepared.
    """

    cfg: CfgNode
    files: RunFiles | None
    saved: dict | None
    result: Result | None
    teacher_accuracy: float | None = None
    trainer: Trainer | None = None

    def prepare(self, sets: ImageSets, teacher: Teacher | None, device: torch.device) -> Trainer:
        """Build student, losses and trainer, and go on from what was saved."""
        cfg, (train_set, evaluation_set) = self.cfg, sets
        if self.saved is not None:
            _check_images(self.saved, [part.fingerprint for part in sets])
        seed_everything(cfg.SEED)
        student = _build_student(cfg, len(train_set.classes))
        frozen = teacher.model if teacher else None
        theirs = cast(Classifier, frozen.model) if frozen else student
        taps = model_taps(student, theirs, cfg.DISTILL.TAPS)
        losses = build_losses(cfg, taps)
        with naming("DISTILL"):
            distiller = Distiller(student, frozen, losses, taps, compile=cfg.COMPILE).to(device)
        followed = {}
        if teacher is not None:
            self.teacher_accuracy = teacher.accuracy
            context = loss_context(theirs, teacher.norms, taps, train_set.labels)
            prepare_distiller(cfg, distiller, context, train_set)
            followed = self._followed(taps, evaluation_set)
        self.trainer = Trainer(cfg, distiller, followed, train_set, evaluation_set, self.files)
        if self.saved is not None:
            parts = {"student": distiller.student, "losses": distiller.losses}
            path = Path(cfg.OUTPUT_DIR) / CHECKPOINT
            check_fits(self.saved, parts, self.trainer.optimizer, path)
            self.trainer.restore(self.saved)
        if self.files is not None:
            self._start_files(self.files, self.trainer.epoch, device)
        return self.trainer

    def _start_files(self, files: RunFiles, epoch: int, device: torch.device) -> None:
        """Write down what is trained, now that nothing refuses it any more."""
        files.result.unlink(missing_ok=True)  # of a shorter run that goes on
        files.write_text("config.yaml", self.cfg.dump())
        files.write_json("environment.json", describe_environment(self.cfg.SEED, device))
        files.start_metrics(epoch)
        if unreached := unreached_milestones(self.cfg):
            files.logger.warning(
                "SOLVER.MILESTONES: the rate does not fall at %s, which SOLVER.EPOCHS %d does "
                "not reach",
                *(", ".join(map(str, unreached)), self.cfg.SOLVER.EPOCHS),
            )

    def _followed(self, taps: Taps, evaluation_set: ImageSet) -> Taps:
        """The stages whose CKA is measured after every epoch, on the evaluation images."""
        if len(evaluation_set) >= MIN_SAMPLES:
            return numbered_stages(taps)
        if self.files is not None:
            self.files.logger.warning(
                "the CKA of the stages is not followed: it needs %d evaluation images or more, "
                "there are %d (DATA.HOLDOUT, or the folder of test images)",
                *(MIN_SAMPLES, len(evaluation_set)),
            )
        return {}

    def conclude(self) -> Result | TrainingFailedError:
        """Write what the run came to, in the first process; every one gets it."""
        if self.trainer is None:
            assert self.result is not None  # else it would have been trained
            return self.result
        if self.trainer.failure is not None:
            return self.trainer.failure
        if self.files is not None:
            self.result = _write_result(self.trainer, self.files, self.teacher_accuracy)
        return from_first_process(self.result)


def _check_alike(cfgs: Sequence[CfgNode]) -> None:
    lead = flatten(cfgs[0])
    for cfg in cfgs[1:]:
        for key, value in flatten(cfg).items():
            if value != lead[key] and not key.startswith(OWN_KEYS):
                raise ConfigError(
                    f"{key}: runs side by side may differ in {', '.join(OWN_KEYS)} only, got "
                    f"{lead[key]!r} and {value!r}"
                )


def _open_run(cfg: CfgNode, resume: bool, stack: ExitStack) -> _Run:
    """Lock the run's folder and read what is there, in the first process; tell the others."""
    files, saved, result = None, None, None
    if rank() == 0:
        with ExitStack() as opened:
            files = opened.enter_context(RunFiles(cfg.OUTPUT_DIR, resume=resume))
            saved = files.load_checkpoint()
            if saved is not None:
                _check_configuration(cfg, saved, files.checkpoint)
                if saved["epoch"] >= cfg.SOLVER.EPOCHS:
                    result = files.read_result()
            elif traces := files.traces():
                result = _result_alone(cfg, files, traces)
            if result is None:
                stack.push(opened.pop_all())  # a finished run is left alone
    saved, result = from_first_process((saved, result))
    return _Run(cfg, files, saved, result)


def _result_alone(cfg: CfgNode, files: RunFiles, traces: list[str]) -> Result:
    """Return what a finished run came to whose checkpoint was removed since, to save room.

    Raises:
        ConfigError: it was another run, or did not finish: it can neither be taken for this one
            nor continued, and to train it anew would overwrite it.
    """
    result, config = files.read_result(), files.directory / "config.yaml"
    if (
        result is not None
        and result.get("epochs") == cfg.SOLVER.EPOCHS
        and config.exists()
        and not changed_keys(load_config(config), cfg)
    ):
        return result
    raise ConfigError(
        f"OUTPUT_DIR: {str(files.directory)!r} holds a run ({', '.join(traces)}) without its "
        f"{files.checkpoint.name}, from which alone it can be continued; put that file back, "
        "choose another OUTPUT_DIR, or remove the folder to train anew"
    )


def _check_configuration(cfg: CfgNode, saved: dict, path: Path) -> None:
    if changed := changed_keys(saved_config(saved, path), cfg):
        raise ConfigError(
            f"OUTPUT_DIR: the run in {cfg.OUTPUT_DIR!r} was started with other values of "
            f"{', '.join(changed)}; continue it with its own (its config.yaml), or choose another "
            "OUTPUT_DIR"
        )
    if saved["epoch"] > cfg.SOLVER.EPOCHS:
        raise ConfigError(
            f"SOLVER.EPOCHS: the run in {cfg.OUTPUT_DIR!r} has {saved['epoch']} epochs already, "
            f"{cfg.SOLVER.EPOCHS} are asked for; choose another OUTPUT_DIR"
        )


def _check_images(saved: dict, fingerprints: list[str]) -> None:
    if saved["images"] != fingerprints:
        raise ConfigError(
            "DATA.ROOT: the images are not those that the run was started with; give the folder "
            "that holds them, or choose another OUTPUT_DIR"
        )


def _load_image_sets(cfg: CfgNode) -> ImageSets:
    """Load the data; a download is the first process's alone."""
    if not cfg.DATA.DOWNLOAD:
        return load_image_sets(cfg)
    sets = load_image_sets(cfg) if rank() == 0 else None
    from_first_process(None)  # wait for it
    return sets or load_image_sets(cfg)


def _train_teacher(cfg: CfgNode, image_sets: ImageSets) -> Path:
    """Train the teacher's own run, or go on with it; return the file of its last epoch."""
    try:
        run_experiment(cfg, resume=True, image_sets=image_sets)
    except ConfigError as error:
        raise ConfigError(
            f"TEACHER.CACHE_DIR: the unfinished training of the teacher does not go on: {error} "
            f"(here: remove {cfg.OUTPUT_DIR!r}, or set another TEACHER.CACHE_DIR)"
        ) from error
    return Path(cfg.OUTPUT_DIR) / "model_last.pth"


def _build_student(cfg: CfgNode, classes: int) -> Classifier:
    name, weights = cfg.STUDENT.NAME, cfg.STUDENT.WEIGHTS
    if weights:
        student = load_classifier(name, weights, classes, role="student")
    else:
        student = create_model(name, classes)
    layout = torch.channels_last if cfg.CHANNELS_LAST else torch.contiguous_format
    return student.to(memory_format=layout)


def _write_result(trainer: Trainer, files: RunFiles, teacher_accuracy: float | None) -> Result:
    cfg = trainer.cfg
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
    files.logger.info(
        "finished: accuracy %.2f %% after the last epoch, %.2f %% after the best (epoch %d)",
        *(result["last_accuracy"], result["best_accuracy"], result["best_epoch"]),
    )
    return result
