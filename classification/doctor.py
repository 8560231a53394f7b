"""Will this machine, and this configuration, train? ``pcka doctor [--config-file F]``."""

from __future__ import annotations

import classification  # noqa: F401  (answers --help before the slow imports)

# isort: split

import argparse
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from classification.arguments import doctor_parser
from classification.config import doubts, load_config, teacher_name, teachers_of
from classification.data import ImageSet, load_image_sets, pixel_statistics
from classification.evaluation import accuracy, is_guessing
from classification.models import named_model, without_weights
from classification.models.taps import Reading, extra_taps, model_taps, read_taps, unlike_signs
from classification.pair import pair_settings
from classification.pixel_checks import check_channels, check_normalisation
from classification.run import Run, check_run, losses_of, untrained_pair
from classification.teacher import (
    PREFLIGHT_POINTS,
    Teacher,
    is_trained,
    prepare_teacher,
    teacher_run,
)
from classification.teacher_outputs import check_outputs
from classification.trainer import Trainer
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.doctor import (
    FAIL,
    PASS,
    SKIP,
    WARN,
    Check,
    Finding,
    Verdict,
    check_disk,
    conclude,
    machine_checks,
    messages_of,
    needing,
)
from pcka.engine.environment import choose_device
from pcka.engine.preflight import is_constant
from pcka.engine.run_folder import CHECKPOINT
from pcka.engine.step_cost import seconds_of, step_cost, tensor_bytes

logger = logging.getLogger("pcka")

SAMPLE = 512  # evaluation images for the teacher checks
DECODED = 32  # images that are decoded and inspected


def main(arguments: Sequence[str] | None = None) -> list[Finding]:
    """Run the requested checks; print one line per finding, and return the findings.

    Raises:
        SystemExit: with status 1 if a check failed.
    """
    given = doctor_parser().parse_intermixed_args(arguments)
    checks = machine_checks()
    pair = given.data, given.student, given.teacher, given.weights
    if any((given.config_file, *pair, given.method, given.overrides)):
        checks += Examination(lambda: _config_of(given), proposes=not given.config_file).checks()
    return conclude(checks)


def _config_of(given: argparse.Namespace) -> CfgNode:
    """Return the configuration that the arguments name, or that is proposed as for training."""
    settings, method = pair_settings(given, given.overrides, given.method)
    return load_config(settings, given.overrides, method)


class Examination:
    """Checks of a configuration; each one builds on what earlier ones found.

    Args:
        load: returns the configuration.
        proposes: whether ``load`` logs proposed settings, which are then reported.
    """

    def __init__(self, load: Callable[[], CfgNode], *, proposes: bool = False) -> None:
        self._load = load
        self._proposes = proposes
        self._notes: list[str] = []
        self._cfg: CfgNode | None = None
        self._sets: tuple[ImageSet, ImageSet] | None = None
        self._sample: ImageSet | None = None
        self._teacher: Teacher | None = None
        self._stand_ins: list[CfgNode] = []  # sections of teachers that are yet to be trained
        self._trainer: Trainer | None = None

    def checks(self) -> list[tuple[str, Check]]:
        """Return the checks in the order in which to run them."""
        proposal = ("proposal", self._needing("configuration", self.show_proposal))
        return [
            ("configuration", self.check_configuration),
            *([proposal] * self._proposes),
            ("models and taps", self._needing("configuration", self.check_models)),
            ("data", self._needing("configuration", self.check_data)),
            ("student's pixels", self._needing("data", self.check_student_pixels)),
            ("teacher", self._needing("data", self.check_teacher)),
            ("teacher's pixels", self._needing("data", self.check_teacher_pixels)),
            ("a step", self._needing("data", self.check_step)),
            ("cost", self._needing("step", self.check_cost)),
            ("disk", self._needing("step", self.check_room)),
        ]

    def _needing(self, what: str, check: Check) -> Check:
        """Return the check, skipped unless what it needs was found."""

        def found() -> object:
            there = {"configuration": self._cfg, "data": self._sample, "step": self._trainer}
            return there[what]

        return needing(what, found, check)

    @property
    def cfg(self) -> CfgNode:
        """The configuration that was read."""
        assert self._cfg is not None
        return self._cfg

    @property
    def sets(self) -> tuple[ImageSet, ImageSet]:
        """Training images, and the sample of the evaluation images."""
        assert self._sets is not None and self._sample is not None
        return self._sets[0], self._sample

    @property
    def trainer(self) -> Trainer:
        """The trainer that ran the step."""
        assert self._trainer is not None
        return self._trainer

    def check_configuration(self) -> Verdict:
        """Check keys and values, the device, and that the output folder holds no run."""
        with messages_of(logger, logging.INFO) as self._notes:
            cfg = self._load()
        choose_device(cfg.DEVICE)
        self._cfg = cfg
        if Path(cfg.OUTPUT_DIR, CHECKPOINT).exists():
            return Verdict(
                WARN,
                f"OUTPUT_DIR: {cfg.OUTPUT_DIR!r} holds a run; continue it with --resume, or choose "
                "another",
            )
        return Verdict(PASS, f"{', '.join(cfg.DISTILL.METHODS)} into {cfg.OUTPUT_DIR}")

    def show_proposal(self) -> Verdict:
        """Report what training would log about the proposed settings."""
        return Verdict(PASS, "; ".join(self._notes))

    def check_models(self) -> Verdict:
        """Check that both models can be built, weights exist, and losses find their taps."""
        cfg = self.cfg
        check_run(cfg)
        student, teacher = untrained_pair(cfg)
        taps = model_taps(student, teacher or student, cfg.DISTILL.TAPS)
        read = sorted({tap for loss in losses_of(cfg, taps) for tap in loss.taps})
        looked_at = {*read, *extra_taps(cfg.DISTILL.TAPS)}
        readings: list[dict[str, Reading]] = []
        for side, (role, model) in enumerate((("student", student), ("teacher", teacher))):
            if model is None:
                continue
            try:
                paths = {name: taps[name][side] for name in looked_at}
                readings.append(read_taps(model, paths, cfg.DATA.IMAGE_SIZE))
            except (ValueError, RuntimeError) as error:
                raise ConfigError(f"DISTILL.TAPS: {role}: {error}") from error
        pair = f"{teacher_name(cfg)} -> {cfg.STUDENT.NAME}" if teacher else cfg.STUDENT.NAME
        notes = unlike_signs(*readings) if teacher else []
        return Verdict(PASS, "; ".join([f"{pair}; taps: {', '.join(read) or 'none'}", *notes]))

    def check_data(self) -> Verdict:
        """Check that both sets exist, and that their images can be decoded and differ."""
        train, test = load_image_sets(self.cfg)
        device = choose_device(self.cfg.DEVICE)
        self._sets = train.to(device), test.to(device)
        images = _spaced(self._sets[0], DECODED)
        decoded, *_ = next(iter(images.evaluation_batches(DECODED)))
        self._sample = _spaced(self._sets[1], SAMPLE)
        count = f"{len(train)} images to train on, {len(test)} to evaluate on"
        text = f"{count}, of {len(test.classes)} classes"
        if len(images) > 1 and is_constant(decoded):
            return Verdict(
                FAIL, f"{text}; {len(images)} of them all look the same: check DATA.ROOT"
            )
        return Verdict(PASS, text)

    def check_student_pixels(self) -> Verdict:
        """Check that the student's statistics bring pixels near mean 0 and standard deviation 1."""
        images, *_ = next(iter(_spaced(self.sets[1], DECODED).evaluation_batches(DECODED)))
        return check_normalisation("STUDENT", self.cfg.STUDENT, images)

    def check_teacher(self) -> Verdict:
        """Check that the teacher is complete, as accurate as stated, and better than guessing."""
        cfg = self.cfg
        if not cfg.TEACHER.NAME:
            return Verdict(PASS, "none: the student learns without one")
        # Hides what the preparation logs, even about a stand-in: the verdict reports it.
        with tempfile.TemporaryDirectory() as folder, messages_of(logger):
            read = {path for _, path in extra_taps(cfg.DISTILL.TAPS).values()}
            lenient = self._with_weights(Path(folder))
            self._teacher = prepare_teacher(lenient, self.sets, _never, read)
        assert self._teacher is not None
        sample, top1, stated = self.sets[1], self._teacher.accuracy, cfg.TEACHER.ACCURACY
        if self._stand_ins:
            first = ", ".join(f"{one.NAME} ({one.EPOCHS} epochs)" for one in self._stand_ins)
            return Verdict(WARN, f"trained first: {first}; accuracy unknown")
        if cfg.TEACHER.OUTPUTS:
            check_outputs(cfg, self._teacher.weights, self.sets[0])
        text = f"{teacher_name(cfg)} reaches {top1:.2f} % on {len(sample)} evaluation images"
        whole = self._sets is not None and len(self._sets[1]) == len(sample)
        noise = 0.0 if whole else 200 * (stated / 100 * (1 - stated / 100) / len(sample)) ** 0.5
        if top1 < stated - PREFLIGHT_POINTS - noise:
            return Verdict(
                FAIL,
                f"{text}, TEACHER.ACCURACY states {stated:.2f} %; check TEACHER.WEIGHTS, "
                "TEACHER.PIXEL_MEAN and PIXEL_STD, and the order of the classes",
            )
        if is_guessing(top1, len(sample.classes), len(sample)):
            return Verdict(
                FAIL,
                f"{text}, at chance level: it is untrained or has other classes; check "
                "TEACHER.WEIGHTS, or set TEACHER.TRAIN True",
            )
        return Verdict(PASS, text + (f", {stated:.2f} % is stated" if stated else ""))

    def check_teacher_pixels(self) -> Verdict:
        """Check that no other channel order or usual statistics improve the teacher."""
        if self._teacher is None or self._stand_ins:
            reason = "no teacher with weights" if self.cfg.TEACHER.NAME else "no teacher"
            return Verdict(SKIP, f"skipped: {reason}")
        return check_channels(self._teacher.model, self.cfg.TEACHER, self.sets[1])

    def check_step(self) -> Verdict:
        """Run one step and check that its loss terms and gradients are finite."""
        cfg, device = self.cfg, self.sets[0].device
        if cfg.TEACHER.NAME and self._teacher is None:
            return Verdict(SKIP, "skipped: needs the teacher")
        try:
            trainer = Run(cfg).prepare(self.sets, self._teacher, device)
            trainer.start_epoch()
            (inputs,) = trainer.inputs([next(iter(trainer.batches()))])
            trainer.step(inputs, trainer.steps_per_epoch - 1)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"SOLVER.BATCH_SIZE: {cfg.SOLVER.BATCH_SIZE} images do not fit the GPU; use "
                "fewer, or set AUTOCAST auto"
            ) from error
        losses = trainer.read_losses()
        named = trainer.distiller.named_parameters()
        wrong = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
        if wrong:
            return Verdict(
                FAIL, f"the gradient of {wrong[0]} is not finite; lower the losses' weights"
            )
        self._trainer = trainer
        text = ", ".join(
            f"{name.removeprefix('loss_')} {value:.4g}" for name, value in losses.items()
        )
        if found := list(doubts(cfg, cfg.SOLVER.EPOCHS * trainer.steps_per_epoch)):
            return Verdict(WARN, f"{text}; " + "; ".join(found))
        return Verdict(PASS, f"{text}; gradients finite")

    def check_cost(self) -> Verdict:
        """Measure time and memory of a step, and estimate the time of the whole run."""
        cfg, trainer, device = self.cfg, self.trainer, self.sets[0].device
        batches = _endless(trainer)

        def step() -> None:
            (inputs,) = trainer.inputs([next(batches)])
            trainer.step(inputs, 0)
            trainer.read_losses()  # waits for the device

        step()
        cost = step_cost(step, device)
        pixels = pixel_statistics(cfg.STUDENT).to(device)
        sample = self.sets[1]
        evaluating = seconds_of(lambda: accuracy(trainer.distiller.student, pixels, sample))
        assert self._sets is not None
        evaluating *= len(self._sets[1]) / len(sample)
        epoch = cost.seconds * trainer.steps_per_epoch + evaluating / cfg.EVAL_EVERY
        spans = {"an epoch": epoch, "the run": epoch * cfg.SOLVER.EPOCHS}
        status, text = cost.verdict(spans, device, "SOLVER.BATCH_SIZE")
        return Verdict(status, text + ", plus the teacher's training" * bool(self._stand_ins))

    def check_room(self) -> Verdict:
        """Check disk space for the run's checkpoints, plus one that is being written."""
        student = tensor_bytes(self.trainer.distiller.student.state_dict())
        every, epochs = self.cfg.KEEP_EVERY, self.cfg.SOLVER.EPOCHS
        kept = len({*range(0, epochs, every), epochs}) if every else 0
        needed = (2 + kept) * student + 2 * tensor_bytes(self.trainer.state())
        return check_disk(self.cfg.OUTPUT_DIR, needed)

    def _with_weights(self, folder: Path) -> CfgNode:
        """Return the configuration with existing teachers, whose outputs are not kept.

        Nothing is trained for a check: each teacher that is yet to be trained is replaced by its
        untrained model, in ``folder``.
        """
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.TEACHER.ACCURACY, cfg.TEACHER.OUTPUTS = 0.0, ""
        sections = (cfg.TEACHER, *cfg.TEACHER.OTHERS)
        for section, one in zip(sections, teachers_of(self.cfg), strict=True):
            if not is_trained(one.TEACHER):
                continue
            _, weights = teacher_run(one, self.sets[0])
            if not weights.exists():
                self._stand_ins.append(one.TEACHER)
                weights = folder / weights.name
                settings = {"role": "teacher", **without_weights(one.TEACHER)}
                model = named_model(one.TEACHER.NAME, len(self.sets[0].classes), **settings)
                torch.save(model.state_dict(), weights)
            section["WEIGHTS"] = str(weights)
        return cfg


def _never(cfg: CfgNode, _: object) -> Path:
    raise AssertionError(f"{cfg.STUDENT.NAME} has its weights")


def _spaced(data: ImageSet, images: int) -> ImageSet:
    """Some images, evenly spaced in the set."""
    chosen = torch.linspace(0, len(data) - 1, min(images, len(data))).long()
    return data.subset(chosen.to(data.device))


def _endless(trainer: Trainer) -> Any:
    while True:
        yield from trainer.batches()


if __name__ == "__main__":
    run_command(main)
