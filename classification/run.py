"""A run from its configuration to its result: what it starts or resumes from, and its files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from fvcore.common.config import CfgNode
from torch import nn

from classification.config import (
    doubts,
    teacher_name,
    teachers_of,
)
from classification.data import ImageSet, load_image_sets
from classification.data.batches import mixes
from classification.models import (
    Classifier,
    model_of,
    named_model,
    without_weights,
)
from classification.models.taps import Taps, extra_taps, loss_context, model_taps, with_stages
from classification.preflight import check_logits, prepare_distiller
from classification.saved_run import Result, load_state, result_alone
from classification.teacher import ImageSets, Teacher, as_one, check_teacher, prepare_teacher
from classification.trainer import Trainer
from pcka import losses
from pcka.analysis.grams import MIN_SAMPLES
from pcka.distiller import Distiller
from pcka.distributed import from_first_process, rank
from pcka.engine.class_names import CLASSES_FILE, write_class_names
from pcka.engine.command import TrainingFailedError
from pcka.engine.config import ConfigError
from pcka.engine.curves import plot_curves
from pcka.engine.distill import UntappedError, build_losses, numbered_stages, too_few_images
from pcka.engine.environment import ENVIRONMENT, describe_environment
from pcka.engine.launch import process_group
from pcka.engine.preflight import naming
from pcka.engine.random_state import seed_everything
from pcka.engine.run_folder import CHECKPOINT, RunFolder, read_metrics, write_text
from pcka.engine.saved_state import check_fits, with_adapters
from pcka.taps import FeatureTap

if TYPE_CHECKING:
    from pcka.engine.report import Report


def run_experiment(
    cfg: CfgNode, *, resume: bool = False, image_sets: ImageSets | None = None
) -> Result:
    """Train as configured into OUTPUT_DIR; return the content of ``result.json``.

    Under ``torchrun`` all processes train together, and only the first one writes.

    Args:
        cfg: as returned by :func:`classification.config.load_config`.
        resume: continue the run in OUTPUT_DIR after its last complete epoch (or start it). A
            finished run is left untouched.
        image_sets: training and evaluation images, if already in memory.

    Raises:
        ConfigError: an existing run without ``resume``, a continuation with a different
            configuration, or data, weights or losses that do not fit together.
        TrainingFailedError: a loss that is not finite.
    """
    check_run(cfg)
    failure = None
    with process_group(cfg.DEVICE) as device, ExitStack() as stack:
        run = Run.open(cfg, resume, stack)
        if run.result is not None:
            return run.result
        (trainer,) = prepare([run], device, image_sets)
        try:
            trainer.train()
        except TrainingFailedError as error:  # raised once the process group is closed
            failure = error
        else:
            return run.conclude(report=cfg.REPORT)
    raise failure


def check_run(cfg: CfgNode) -> None:
    """Refuse what would fail later, before reading data or training a teacher.

    Raises:
        ConfigError: missing weights, or as :func:`check_losses`.
    """
    check_teacher(cfg)
    if cfg.STUDENT.WEIGHTS and not Path(cfg.STUDENT.WEIGHTS).is_file():
        raise ConfigError(f"STUDENT.WEIGHTS: there is no file {cfg.STUDENT.WEIGHTS!r}")
    check_losses(cfg)


def check_losses(cfg: CfgNode) -> None:
    """Refuse losses with invalid settings, or whose taps the models do not have.

    Raises:
        ConfigError: as :func:`losses_of` and :func:`untrained_pair`.
    """
    student, teacher = untrained_pair(cfg)
    _check_own_taps(cfg, student, teacher)
    try:
        losses_of(cfg, model_taps(student, teacher or student, cfg.DISTILL.TAPS))
    except UntappedError as error:
        raise ConfigError(f"{error}; train.py --show-taps prints them with their shapes") from None


def _check_own_taps(cfg: CfgNode, student: Classifier, teacher: Classifier | None) -> None:
    """Refuse paths in ``DISTILL.TAPS`` that the models do not have, whether read or not."""
    own = extra_taps(cfg.DISTILL.TAPS)
    for role, side, model in (("student", 0, student), ("teacher", 1, teacher)):
        if model is None:
            continue
        with naming(f"DISTILL.TAPS: {role}"):
            FeatureTap(model, {name: pair[side] for name, pair in own.items()}).remove()


def untrained_pair(cfg: CfgNode) -> tuple[Classifier, Classifier | None]:
    """Return student and teacher untrained, with two classes and their stages.

    Raises:
        ConfigError: an unknown model, or one that refuses its keywords or images of this size.
    """
    student = _untrained(cfg, "STUDENT")
    if not cfg.TEACHER.NAME:
        return student, None
    return student, as_one(cfg, [_untrained(one, "TEACHER") for one in teachers_of(cfg)])


def _untrained(cfg: CfgNode, role: str) -> Classifier:
    section, side = cfg[role], cfg.DATA.IMAGE_SIZE
    model = named_model(section.NAME, 2, role=role.lower(), **without_weights(section))
    try:
        return with_stages(model, side, checked=True)
    except ValueError as error:
        if "LOGITS: " in str(error):
            raise ConfigError(f"{role}.LOGITS: {str(error).partition('LOGITS: ')[2]}") from error
        raise ConfigError(
            f"{role}.NAME: {error}; set DATA.IMAGE_SIZE, or the model's size in {role}.KWARGS"
        ) from error


def losses_of(cfg: CfgNode, taps: Taps) -> list[losses.Loss]:
    """Return the losses of a configuration, see :func:`pcka.engine.distill.build_losses`.

    Args:
        cfg: ``DISTILL``, ``TEACHER.NAME``, ``SOLVER.BATCH_SIZE`` and ``DATA``'s mixing are read.
        taps: what the losses may name as stages.

    Raises:
        ConfigError: as there, or a loss that is for detectors, needs a teacher without there being
            one, refuses mixed images although ``DATA`` mixes them, can be negative although
            ``DISTILL.RELATIVE`` scales it, or needs a larger batch.
    """

    def unfit(loss: losses.Loss) -> str | None:
        if loss.of_detectors:
            return "is for detectors or segmenters: it compares their heads or object boxes"
        if mixes(cfg.DATA) and loss.refuses_soft_targets:
            from classification.data.mixing import mixing_keys  # few runs mix images

            return (
                f"cannot learn from mixed images ({mixing_keys(cfg.DATA)}): "
                f"{loss.refuses_soft_targets}; set it to 0, or leave the loss out"
            )
        if cfg.DISTILL.RELATIVE and loss.can_be_negative:
            return (
                "can be negative, so that DISTILL.RELATIVE cannot scale it to cross-entropy's "
                "value; set that to False, or leave the loss out"
            )
        if not loss.needs_teacher or cfg.TEACHER.NAME:
            return too_few_images(loss, cfg.SOLVER.BATCH_SIZE, "SOLVER.BATCH_SIZE")
        return (
            "needs a teacher, but TEACHER.NAME is empty; name one, with TEACHER.WEIGHTS or "
            "TEACHER.TRAIN True"
        )

    return build_losses(cfg.DISTILL.METHODS, cfg.DISTILL, taps, unfit=unfit)


def prepare(
    runs: Sequence[Run], device: torch.device, image_sets: ImageSets | None = None
) -> Iterator[Trainer]:
    """Yield the trainer of each student, at its start or its saved state.

    Each one draws from the random state at the time it is yielded.

    Args:
        runs: with the same data and teacher.
        image_sets: training and evaluation images, if already in memory.
    """
    lead = runs[0].cfg
    train_set, evaluation_set = image_sets or load_image_sets(lead)
    sets = train_set.to(device), evaluation_set.to(device)
    taps = (extra_taps(run.cfg.DISTILL.TAPS) for run in runs)
    read = {path for by_name in taps for _, path in by_name.values()}
    teacher = prepare_teacher(lead, sets, _train_teacher, read)
    for run in runs:
        yield run.prepare(sets, teacher, device)


def prepare_trainers(
    cfgs: Sequence[CfgNode], device: torch.device, image_sets: ImageSets | None = None
) -> list[Trainer]:
    """Return the trainer of each student at its start, without files; see :func:`prepare`."""
    return list(prepare([Run(cfg) for cfg in cfgs], device, image_sets))


@dataclass
class Run:
    """One student's run, from its folder to its result.

    Attributes:
        files: None in all processes except the first.
        saved: the state to resume from.
        result: set if the run was finished before.
        teacher_accuracy: percent.
        trainer: set once it is prepared.
    """

    cfg: CfgNode
    files: RunFolder | None = None
    saved: dict | None = None
    result: Result | None = None
    teacher_accuracy: float | None = None
    trainer: Trainer | None = None

    @classmethod
    def open(cls, cfg: CfgNode, resume: bool, stack: ExitStack) -> Run:
        """Lock and read the run's folder in the first process, and share the contents with all."""
        files, saved, result = None, None, None
        if rank() == 0:
            with ExitStack() as opened:
                files = opened.enter_context(RunFolder(cfg.OUTPUT_DIR, resume=resume))
                if files.checkpoint.exists():
                    saved = load_state(cfg, files.checkpoint)
                    finished = saved["epoch"] >= cfg.SOLVER.EPOCHS
                    result = files.read_result() if finished else None
                elif traces := files.traces():
                    result = result_alone(cfg, files, traces)
                if result is None:
                    stack.push(opened.pop_all())  # a finished run is left alone
            if result is not None:
                files.logger.info(
                    "already finished: accuracy %.2f %% after the last epoch, %.2f %% after the "
                    "best; use another OUTPUT_DIR to train again",
                    *(result.get("last_accuracy", nan), result.get("best_accuracy", nan)),
                )
            elif saved is not None:
                files.logger.info(
                    "resuming after epoch %d of %d", saved["epoch"], cfg.SOLVER.EPOCHS
                )
        saved, result = from_first_process((saved, result))
        return cls(cfg, files, saved, result)

    def prepare(self, sets: ImageSets, teacher: Teacher | None, device: torch.device) -> Trainer:
        """Build student, losses and trainer, and restore the saved state, if any."""
        cfg, (train_set, evaluation_set) = self.cfg, sets
        if self.saved is not None and self.saved["images"] != [s.fingerprint for s in sets]:
            raise ConfigError(
                "DATA.ROOT: the images are not those the run was started with; give the folder "
                "that holds them, or choose another OUTPUT_DIR"
            )
        seed_everything(cfg.SEED)
        student = _build_student(cfg, len(train_set.classes))
        if self.saved is None and cfg.DISTILL.INHERIT:
            _inherit(student, teacher, cfg)
        frozen = teacher.model if teacher else None
        theirs = cast(Classifier, frozen.model) if frozen else student
        taps = model_taps(student, theirs, cfg.DISTILL.TAPS)
        with naming("DISTILL"):
            distiller = Distiller(
                *(student, frozen, losses_of(cfg, taps), taps),
                relative_to="loss_ce" if cfg.DISTILL.RELATIVE else "",
                compile=cfg.COMPILE,
            ).to(device)
        check_logits(student, "student", cfg, len(train_set.classes))
        followed: Taps = {}
        if teacher is not None:
            self.teacher_accuracy = teacher.accuracy
            context = loss_context(theirs, teacher.norms, taps, train_set.labels)
            prepare_distiller(cfg, distiller, context, train_set)
            followed = self._followed(taps, evaluation_set)
        kept = teacher.outputs if teacher else None
        self.trainer = Trainer(
            cfg, distiller, followed, train_set, evaluation_set, self.files, kept
        )
        if self.saved is not None:
            self._restore(self.saved, self.trainer)
        if self.files is not None:
            batches = cfg.SOLVER.EPOCHS * self.trainer.steps_per_epoch
            updates = batches // cfg.SOLVER.ACCUMULATE
            write_class_names(self.files.directory / CLASSES_FILE, train_set.classes)
            self._start_files(self.files, self.trainer.epoch, updates, device)
        return self.trainer

    def _restore(self, saved: dict, trainer: Trainer) -> None:
        path, distiller = Path(self.cfg.OUTPUT_DIR) / CHECKPOINT, trainer.distiller
        saved = with_adapters(saved, distiller, path)
        parts = {name: getattr(distiller, name) for name in ("student", "losses", "adapters")}
        if trainer.average is not None:
            parts["ema"] = trainer.average.model
        check_fits(saved, parts, trainer.optimizer, path)
        trainer.restore(saved)

    def _start_files(
        self, files: RunFolder, epoch: int, updates: int, device: torch.device
    ) -> None:
        """Write down what is trained, now that all checks have passed."""
        files.result.unlink(missing_ok=True)  # of a shorter run that is extended
        write_text(files.directory / "config.yaml", self.cfg.dump())
        files.write_json(ENVIRONMENT, describe_environment(self.cfg.SEED, device))
        files.start_metrics(epoch)
        files.start_kept(epoch)
        for doubt in doubts(self.cfg, updates):
            files.logger.warning(doubt)

    def _followed(self, taps: Taps, evaluation_set: ImageSet) -> Taps:
        """Return the stages whose CKA is measured at every evaluation."""
        if len(evaluation_set) >= MIN_SAMPLES:
            return {name: taps[name] for name in numbered_stages(taps)}
        if self.files is not None:
            self.files.logger.warning(
                "the CKA of the stages is not tracked: it needs at least %d evaluation images, "
                "got %d (DATA.HOLDOUT, or the folder of test images)",
                *(MIN_SAMPLES, len(evaluation_set)),
            )
        return {}

    def conclude(self, *, report: bool = False) -> Result:
        """Write the run's result in the first process; return it in all.

        Args:
            report: also write ``report.html`` and ``report.json``.
        """
        if self.trainer is not None and self.files is not None:
            self.result = _write_result(self.trainer, self.files, self.teacher_accuracy)
            if report:
                _write_report(self.trainer, self.files)
        return from_first_process(self.result)


def _train_teacher(cfg: CfgNode, image_sets: ImageSets) -> Path:
    """Train the teacher in its own run, or resume it; return the weights of its last epoch."""
    try:
        run_experiment(cfg, resume=True, image_sets=image_sets)
    except ConfigError as error:
        raise ConfigError(
            f"TEACHER.CACHE_DIR: the teacher's unfinished training cannot be resumed: {error} "
            f"(here: remove {cfg.OUTPUT_DIR!r}, or set another TEACHER.CACHE_DIR)"
        ) from error
    return Path(cfg.OUTPUT_DIR) / "model_last.pth"


def _build_student(cfg: CfgNode, classes: int) -> Classifier:
    student = model_of(cfg.STUDENT, classes, role="student")
    if cfg.STUDENT.BN_MOMENTUM:
        from classification.batch_norm import set_momentum  # few runs change it

        set_momentum(student, cfg.STUDENT.BN_MOMENTUM)
    student = with_stages(student, cfg.DATA.IMAGE_SIZE)
    layout = torch.channels_last if cfg.CHANNELS_LAST else torch.contiguous_format
    return student.to(memory_format=layout)


def _inherit(student: nn.Module, teacher: Teacher | None, cfg: CfgNode) -> None:
    """Initialise a student from parts of its teacher."""
    if teacher is None:
        raise ConfigError("DISTILL.INHERIT: there is no teacher to inherit from; set TEACHER.NAME")
    from pcka.engine.inherit import inherit_weights  # few runs inherit

    unlike = [k for k in ("PIXEL_MEAN", "PIXEL_STD") if cfg.STUDENT[k] != cfg.TEACHER[k]]
    inherit_weights(
        student, teacher.weights, cfg.DISTILL.INHERIT, logging.getLogger("pcka"), unlike=unlike
    )


def _write_report(trainer: Trainer, files: RunFolder) -> None:
    from classification.report import Material, make_report  # imports that training does not need
    from pcka.engine.report import attempt

    folder, sets = files.directory, (trainer.train_set, trainer.evaluation_set)

    def make() -> Report:
        return make_report(Material.of_run(folder), sets)

    attempt(make, folder, files.logger, f"pcka report {folder}")


def _write_result(trainer: Trainer, files: RunFolder, teacher_accuracy: float | None) -> Result:
    cfg = trainer.cfg
    metrics = read_metrics(files.metrics)
    plot_curves(metrics, files.directory / "curves.png", teacher_accuracy)
    result = {
        "methods": list(cfg.DISTILL.METHODS),
        "student": cfg.STUDENT.NAME,
        "teacher": teacher_name(cfg) or None,
        "teacher_accuracy": teacher_accuracy,
        "last_accuracy": metrics[-1]["accuracy"],
        **({"last_accuracy_ema": metrics[-1]["accuracy_ema"]} if trainer.average else {}),
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
