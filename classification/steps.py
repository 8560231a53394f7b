"""Training steps: from the batches to the updates of students side by side."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import cast

import torch
from torch import Tensor

from classification.config import ConfigError
from classification.cuda_graph import CapturedFunction, RecordingError
from classification.data import Batch
from classification.environment import autocast
from classification.trainer import StepInputs, Trainer
from pcka.distributed import world_size
from pcka.losses import Loss, Outputs
from pcka.observer import Observer
from pcka.teacher import FrozenTeacher

logger = logging.getLogger("classification")

TEACHER_AHEAD = 8
TEACHER_IMAGES = 2048  # at once, at most


class Steps:
    """The steps of students that are trained side by side.

    Students of one ``SEED`` share their batches, and what the teacher says of them. On a CUDA
    device the whole step of all students is one graph, each student on a stream of its own, and
    the teacher another one that runs some batches ahead: a step then costs the device's work
    alone, not the time that Python takes to launch it. Where that cannot be (:func:`obstacle`),
    one student is updated after the other.

    Args:
        trainers: on one device.
        ahead: batches that the teacher sees at once, where steps are recorded.
        record: whether they are, where they can be.

    Attributes:
        trainers: likewise.
    """

    def __init__(
        self, trainers: Sequence[Trainer], ahead: int = TEACHER_AHEAD, *, record: bool = True
    ) -> None:
        self.trainers = tuple(trainers)
        self._lead = self.trainers[0]
        self._observe = teacher_observer(self.trainers)
        seeds = list(dict.fromkeys(trainer.cfg.SEED for trainer in self.trainers))
        self._seed_of = [seeds.index(trainer.cfg.SEED) for trainer in self.trainers]
        self._first_of_seed = [self.trainers[self._seed_of.index(i)] for i in range(len(seeds))]
        taught = zip(self.trainers, self._seed_of)
        self._taught_seeds = sorted({i for t, i in taught if t.distiller.runs_teacher})
        self._step: CapturedFunction | None = None
        self._teacher: CapturedFunction | None = None
        images = self._lead.cfg.SOLVER.BATCH_SIZE * max(1, len(self._taught_seeds))
        self._ahead = max(1, min(ahead, TEACHER_IMAGES // images))
        self._captures = record
        if record and (reason := obstacle(self.trainers)):
            self._give_up(reason)

    def batches(self) -> Iterator[tuple[Batch, ...]]:
        """The epoch's batches, one for each ``SEED``."""
        return zip(*(first.batches() for first in self._first_of_seed), strict=True)

    def inputs(self, batches: Iterable[tuple[Batch, ...]]) -> Iterator[list[StepInputs]]:
        """What the students of each ``SEED`` train on, step by step."""
        batches, ahead = iter(batches), self._ahead if self._captures else 1
        while group := list(islice(batches, ahead)):
            for step, outputs in zip(group, self._teach(group, ahead), strict=True):
                yield [
                    StepInputs(batch.images, batch.labels, batch.indices, of_teacher)
                    for batch, of_teacher in zip(step, outputs, strict=True)
                ]

    def run(self, inputs: list[StepInputs], step: int) -> None:
        """Update every student that still trains.

        Args:
            inputs: of each ``SEED``.
            step: of the epoch, from 0.
        """
        for trainer in self.trainers:
            trainer.set_schedule(step)
        recorded = self._recorded(inputs) if self._captures else None
        if recorded is None:
            for trainer, seed in zip(self.trainers, self._seed_of):
                if trainer.waiting:
                    trainer.step(inputs[seed], step)
            return
        for trainer, terms in zip(self.trainers, recorded(inputs), strict=True):
            if trainer.waiting:
                trainer.keep_losses(terms.clone())

    def _recorded(self, inputs: list[StepInputs]) -> CapturedFunction | None:
        """The step of all students as a graph; None, and a warning, where it cannot be one."""
        if self._step is not None:
            return self._step
        changed = [tensor for trainer in self.trainers for tensor in trainer.changed_tensors()]
        streams = [torch.cuda.Stream() for _ in self.trainers]
        try:
            self._step = CapturedFunction(lambda own: self._update(own, streams), inputs, changed)
        except RecordingError as error:
            self._give_up_after(error)
            return None
        if self._step.draws and len(self.trainers) > 1:
            self._give_up("it draws random numbers, which students side by side must not share")
        return self._step

    def _update(self, inputs: list[StepInputs], streams: list[torch.cuda.Stream]) -> list[Tensor]:
        """Every student's update on its own stream; their loss terms."""
        terms, current = [], torch.cuda.current_stream()
        for trainer, seed, stream in zip(self.trainers, self._seed_of, streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                terms.append(trainer.update(inputs[seed]))
        for stream in streams:
            current.wait_stream(stream)
        return terms

    def _give_up_after(self, error: RecordingError) -> None:
        if error.draws_are_lost:
            raise ConfigError(
                f"CUDA_GRAPH: the step cannot be recorded ({error}); start again with it False"
            ) from error
        self._give_up(f"recording it failed: {error}")

    def _give_up(self, reason: str) -> None:
        self._captures, self._step, self._teacher = False, None, None
        if self._lead.device.type == "cuda" and self._lead.cfg.CUDA_GRAPH:
            logger.warning("CUDA_GRAPH: the step runs kernel by kernel: %s", reason)

    def _teach(self, group: list[tuple[Batch, ...]], ahead: int) -> Iterable[list[Outputs | None]]:
        """What the teacher says of the batches of some steps; None where nobody asks."""
        observe = self._observe
        if observe is None:
            return [[None] * len(step) for step in group]
        padded = group + group[-1:] * (ahead - len(group))  # a graph is of one shape
        images = [step[seed].images for step in padded for seed in self._taught_seeds]
        outputs = self._ask(observe, images[0] if len(images) == 1 else torch.cat(images))
        parts = iter(_split(outputs, len(images), len(images[0])))
        return [
            [next(parts) if seed in self._taught_seeds else None for seed in range(len(step))]
            for step in group
        ]

    def _ask(self, observe: Observer, images: Tensor) -> Outputs:
        ask = partial(ask_teacher, self._lead, observe)
        if not self._captures:
            return ask(images)
        if self._teacher is None:
            try:
                self._teacher = CapturedFunction(ask, images, [])
            except RecordingError as error:
                self._give_up_after(error)
                return ask(images)
        outputs: Outputs = self._teacher(images)
        return outputs


def obstacle(trainers: Sequence[Trainer]) -> str | None:
    """Why the step of these students cannot be a CUDA graph, if it cannot."""
    if trainers[0].device.type != "cuda":
        return "the device is no CUDA device"
    if not trainers[0].cfg.CUDA_GRAPH:
        return "CUDA_GRAPH is False"
    if world_size() > 1:
        return "several processes train together"
    losses = (cast(Loss, loss) for trainer in trainers for loss in trainer.distiller.losses)
    if unfit := sorted({type(loss).__name__ for loss in losses if not loss.capturable}):
        return f"{', '.join(unfit)} cannot be part of one"
    return None


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
    teacher = cast(FrozenTeacher, learners[0].teacher)  # it runs
    return teacher.observer(paths, compile=trainers[0].cfg.COMPILE)


def ask_teacher(trainer: Trainer, observe: Observer, images: Tensor) -> Outputs:
    """The teacher's outputs on images (B, 3, S, S) in [0, 1]."""
    with autocast(trainer.cfg, images.device):
        return observe(trainer.for_teacher(images))


def _split(outputs: Outputs, parts: int, size: int) -> Iterator[Outputs]:
    """``parts`` pieces of ``size`` samples."""
    for start in range(0, parts * size, size):
        piece = slice(start, start + size)
        logits = None if outputs.logits is None else outputs.logits[piece]
        yield Outputs(logits, {name: x[piece] for name, x in outputs.features.items()})
