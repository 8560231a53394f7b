"""Students trained side by side: one teacher and one pass over the images for all of them.

Each student draws random numbers as if it were alone; only this file switches random states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from classification.data import Batch
from classification.lessons import Lessons, StepInputs
from classification.run import Result, Run, check_run, prepare
from classification.teacher import ImageSets
from classification.trainer import Trainer
from pcka.engine.command import TrainingFailedError
from pcka.engine.config import ConfigError, flatten
from pcka.engine.cuda_graph import Recorded
from pcka.engine.launch import process_group
from pcka.engine.random_state import capture_random_state, restore_random_state

OWN_KEYS = ("SEED", "IMPORTS", "STUDENT.", "DISTILL.", "OUTPUT_DIR")  # may differ between the runs


def run_side_by_side(
    cfgs: Sequence[CfgNode], *, resume: bool = False, image_sets: ImageSets | None = None
) -> list[Result | TrainingFailedError]:
    """Train several students with one teacher, each as ``run_experiment`` would train it alone.

    For all runs with the same seed, batches are made once and the teacher runs once, which is much
    faster than one after the other; on a GPU, all students are trained at the same time.

    Args:
        cfgs: configurations that differ only in :data:`OWN_KEYS`.
        resume: as in :func:`classification.run.run_experiment`, for each run.
        image_sets: likewise.

    Returns:
        The result of each run, or why it failed.
    """
    _check_alike(cfgs)
    for cfg in cfgs:
        check_run(cfg)
    sweep = Sweep()
    with process_group(cfgs[0].DEVICE) as device, ExitStack() as stack:
        runs = [Run.open(cfg, resume, stack) for cfg in cfgs]
        missing = [run for run in runs if run.result is None]
        for trainer in prepare(missing, device, image_sets) if missing else ():
            sweep.add(trainer)
        sweep.train()
        return [sweep.failure_of(run.trainer) or run.conclude() for run in runs]


def _check_alike(cfgs: Sequence[CfgNode]) -> None:
    lead = flatten(cfgs[0])
    for cfg in cfgs[1:]:
        for key, value in flatten(cfg).items():
            if not key.startswith(OWN_KEYS) and value != lead[key]:
                own = ", ".join(OWN_KEYS)
                got = f"got {lead[key]!r} and {value!r}"
                raise ConfigError(f"{key}: runs side by side may differ in {own} only, {got}")


class Sweep:
    """Trains students so that each one learns what it would learn alone.

    Students that have completed the same number of epochs are trained side by side.

    Attributes:
        failures: why students were given up.
    """

    def __init__(self) -> None:
        self._random: dict[Trainer, dict[str, object]] = {}
        self.failures: dict[Trainer, TrainingFailedError] = {}

    def add(self, trainer: Trainer) -> None:
        """Add a student with the current random state."""
        self._random[trainer] = capture_random_state()

    def train(self) -> None:
        """Train every student to its last epoch, or until it fails."""
        beside: SideBySide | None = None
        while waiting := [
            trainer
            for trainer in self._random
            if trainer not in self.failures and trainer.epoch < trainer.cfg.SOLVER.EPOCHS
        ]:
            epoch = min(trainer.epoch for trainer in waiting)
            group = tuple(trainer for trainer in waiting if trainer.epoch == epoch)
            if len(group) == 1:
                with self.random_state_of(group[0]), self._failing(group[0]):
                    group[0].train_epoch()
                continue
            if beside is None or beside.trainers != group:
                beside = SideBySide(group, self)
            self._train_epoch(beside)

    def failure_of(self, trainer: Trainer | None) -> TrainingFailedError | None:
        """Return why a student was given up, or None if it was not."""
        return None if trainer is None else self.failures.get(trainer)

    @contextmanager
    def random_state_of(self, trainer: Trainer) -> Iterator[None]:
        """Draw from a student's own random state, as if no other were trained beside it."""
        outside = capture_random_state()
        restore_random_state(self._random[trainer])
        try:
            yield
            self._random[trainer] = capture_random_state()
        finally:
            restore_random_state(outside)

    @contextmanager
    def _failing(self, trainer: Trainer) -> Iterator[None]:
        """Record why a student fails; the others continue."""
        try:
            yield
        except TrainingFailedError as error:
            self.failures[trainer] = error

    def _train_epoch(self, beside: SideBySide) -> None:
        lead = beside.trainers[0]
        for trainer in beside.trainers:
            with self.random_state_of(trainer):
                trainer.start_epoch()
        with lead.pace() as pace:
            for step, inputs in enumerate(beside.inputs(pace.watch(beside.batches()))):
                beside.step(inputs, step)
                pace.count_step()
                if lead.reads_after(step):
                    for trainer in beside.training:
                        with self._failing(trainer):
                            trainer.read_losses()
                    if not (training := beside.training):
                        return
                    pace.show(loss=training[0].read_losses()["loss_total"])
        training = beside.training
        figures = pace.figures(len(training))
        for trainer in training:
            with self.random_state_of(trainer), self._failing(trainer):
                trainer.finish_epoch(dict(figures))


class SideBySide:
    """The steps of students that are trained side by side.

    Students with the same ``SEED`` share their batches and the teacher's outputs on them. On a CUDA
    device, the whole step of all students is one graph, with each student on its own stream; if
    that is not possible, the students are updated one after the other.
    """

    def __init__(self, trainers: tuple[Trainer, ...], sweep: Sweep) -> None:
        self.trainers = trainers
        self._sweep = sweep
        seeds = list(dict.fromkeys(trainer.cfg.SEED for trainer in trainers))
        by_seed = [[t for t in trainers if seed == t.cfg.SEED] for seed in seeds]
        self._seed_of = [seeds.index(trainer.cfg.SEED) for trainer in trainers]
        self._first_of_seed = [group[0] for group in by_seed]
        obstacles = [t.obstacle for t in trainers if t.obstacle is not None]
        obstacle = max(obstacles, default=None)  # a non-empty one, which is reported, if any
        lead = trainers[0]
        learners = [[trainer.distiller for trainer in group] for group in by_seed]
        self._lessons = Lessons(
            lead.cfg, learners, lead.device, obstacle=obstacle, kept=lead.kept, seeds=seeds
        )
        self._streams: list[torch.cuda.Stream] = []
        self._update = Recorded(
            self._on_streams,
            self._changed_tensors,
            kind=lambda: lead.kind,
            obstacle=obstacle,
            plain=self._in_turn,
            may_draw=False,
        )

    @property
    def training(self) -> list[Trainer]:
        """The students that have not failed."""
        return [trainer for trainer in self.trainers if trainer not in self._sweep.failures]

    def batches(self) -> Iterator[tuple[Batch, ...]]:
        """The epoch's batches, one per ``SEED``."""
        return zip(*(first.batches() for first in self._first_of_seed), strict=True)

    def inputs(self, batches: Iterable[Sequence[Batch]]) -> Iterator[list[StepInputs]]:
        """The batches of each step with the teacher's outputs on them."""
        return self._lessons.over(batches, self.trainers[0].epoch)

    def step(self, inputs: list[StepInputs], step: int) -> None:
        """Update every student that still trains, with the inputs of its ``SEED``."""
        for trainer in self.trainers:
            trainer.set_schedule(step)
        update = self._in_turn if self.trainers[0].measures_gradients else self._update
        for trainer, terms in zip(self.trainers, update(inputs), strict=True):
            if terms is not None and trainer not in self._sweep.failures:
                trainer.keep_losses(terms.clone())

    def _changed_tensors(self) -> list[Tensor]:
        self._streams = [torch.cuda.Stream() for _ in self.trainers]
        return [tensor for trainer in self.trainers for tensor in trainer.changed_tensors()]

    def _on_streams(self, inputs: list[StepInputs]) -> list[Tensor]:
        """Update every student on its own stream; return their loss terms."""
        terms, current = [], torch.cuda.current_stream()
        for trainer, seed, stream in zip(self.trainers, self._seed_of, self._streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                terms.append(trainer.update(inputs[seed]))
        for stream in self._streams:
            current.wait_stream(stream)
        return terms

    def _in_turn(self, inputs: list[StepInputs]) -> list[Tensor | None]:
        """Update every student that still trains, one after the other; return their loss terms."""
        terms: list[Tensor | None] = []
        for trainer, seed in zip(self.trainers, self._seed_of, strict=True):
            if trainer in self._sweep.failures:
                terms.append(None)
                continue
            with self._sweep.random_state_of(trainer):
                terms.append(trainer.update(inputs[seed]))
        return terms
