"""The training loop: one pass over the batches and the teacher for all students beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from classification.config import ConfigError
from classification.data import Batch, PixelNormalize
from classification.environment import autocast
from classification.loss_window import NonFiniteLossError
from classification.progress import Progress
from classification.trainer import StepInputs, Trainer
from pcka.observer import Observer


def train(trainers: Sequence[Trainer]) -> None:
    """Train every student to its last epoch, or until it fails.

    Students that have completed the same number of epochs are trained side by side: the batches
    are made and the teacher runs once for all of them. What each one learns is what it would
    learn alone.

    Args:
        trainers: of one teacher, one training set, and configurations that differ in ``DISTILL``
            only. A failure is kept in its ``Trainer.failure``.
    """
    observe = teacher_observer(trainers)
    while waiting := [trainer for trainer in trainers if trainer.waiting]:
        epoch = min(trainer.epoch for trainer in waiting)
        _train_epoch([trainer for trainer in waiting if trainer.epoch == epoch], observe)


def teacher_observer(trainers: Sequence[Trainer]) -> Observer | None:
    """The teacher with the taps of all students; None where none of them needs it.

    Raises:
        ConfigError: students that mean different modules of the teacher by the same tap.
    """
    learners = [trainer.distiller for trainer in trainers if trainer.distiller.runs_teacher]
    if not learners:
        return None
    paths: dict[str, str] = {}
    for tap, path in (item for learner in learners for item in learner.teacher_paths.items()):
        if paths.setdefault(tap, path) != path:
            raise ConfigError(
                f"DISTILL.TAPS: {tap!r} is {paths[tap]!r} of the teacher for one student and "
                f"{path!r} for another beside it; give them different names"
            )
    return learners[0].teacher.observer(paths, compile=trainers[0].cfg.COMPILE)


def _train_epoch(trainers: list[Trainer], observe: Observer | None) -> None:
    lead = trainers[0]
    cfg, steps = lead.cfg, lead.steps_per_epoch
    clock = _Clock()
    desc = f"epoch {lead.epoch + 1}/{cfg.SOLVER.EPOCHS}"
    bar = Progress(desc, steps * cfg.SOLVER.BATCH_SIZE, unit_scale=True)
    for trainer in trainers:
        trainer.start_epoch()
    with bar:
        for step, batch in enumerate(clock.watch(lead.batches())):
            inputs = prepare_inputs(trainers, batch, observe)
            for trainer in trainers:
                trainer.step(inputs, step)
            bar.update(cfg.SOLVER.BATCH_SIZE)
            if (step + 1) % cfg.LOG_EVERY == 0 or step + 1 == steps:
                trainers = _still_finite(trainers)
                if not trainers:
                    return
                bar.set_postfix(loss=f"{trainers[0].window.read()['loss_total']:.4g}")
    figures = clock.figures(cfg.SOLVER.BATCH_SIZE, len(trainers))
    for trainer in trainers:
        try:
            with trainer.own_random_state():
                trainer.finish_epoch(dict(figures))
        except NonFiniteLossError as error:
            trainer.fail(error)


def _still_finite(trainers: list[Trainer]) -> list[Trainer]:
    """Read the losses since the last time; leave out the students whose losses broke."""
    for trainer in trainers:
        try:
            trainer.window.read()
        except NonFiniteLossError as error:
            trainer.fail(error)
    return [trainer for trainer in trainers if trainer.waiting]


def prepare_inputs(
    trainers: Sequence[Trainer], batch: Batch, observe: Observer | None
) -> StepInputs:
    """Normalise the images for both models, and run the teacher where one of the students needs it.

    Args:
        trainers: of the students.
        batch: of this process.
        observe: of :func:`teacher_observer`.
    """
    lead, teacher = trainers[0], None
    images = _normalized(lead, lead.student_pixels, batch.images)
    if observe is not None and any(trainer.distiller.runs_teacher for trainer in trainers):
        with autocast(lead.cfg, images.device):
            teacher = observe(_normalized(lead, lead.teacher_pixels, batch.images))
    return StepInputs(images, batch.labels, batch.indices, teacher)


def _normalized(lead: Trainer, pixels: PixelNormalize, images: Tensor) -> Tensor:
    layout = torch.channels_last if lead.cfg.CHANNELS_LAST else torch.contiguous_format
    return pixels(images).contiguous(memory_format=layout)


class _Clock:
    """Times an epoch on the host; the first step, which warms up, does not count for the rate."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._warm = self._start
        self._steps = 0
        self._waiting = 0.0

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches; what they take to come is time in data."""
        asked = time.perf_counter()
        for batch in batches:
            self._waiting += time.perf_counter() - asked
            yield batch
            if self._steps == 0:
                self._warm = time.perf_counter()
            self._steps += 1
            asked = time.perf_counter()

    def figures(self, batch_size: int, students: int) -> dict[str, float]:
        """Seconds of the epoch, images a second, the share of time in data, students beside it."""
        end = time.perf_counter()
        timed = max(self._steps - 1, 1) * batch_size
        return {
            "seconds": end - self._start,
            "images_per_second": timed / (end - (self._warm if self._steps > 1 else self._start)),
            "data_share": self._waiting / (end - self._start),
            "students": students,
        }
