"""The training loop: epochs of students side by side."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TypeVar

from classification.loss_window import NonFiniteLossError
from classification.progress import Progress
from classification.steps import Steps
from classification.trainer import Trainer

T = TypeVar("T")


def train(trainers: Sequence[Trainer]) -> None:
    """Train every student to its last epoch, or until it fails.

    Students that have completed the same number of epochs are trained side by side, see
    :class:`classification.steps.Steps`. What each one learns is what it would learn alone.

    Args:
        trainers: of one teacher, one training set, and configurations that differ in ``SEED``,
            ``STUDENT`` and ``DISTILL`` only. A failure is kept in its ``Trainer.failure``.
    """
    with trainers[0].own_random_state() if len(trainers) == 1 else nullcontext():
        steps: Steps | None = None
        while waiting := [trainer for trainer in trainers if trainer.waiting]:
            epoch = min(trainer.epoch for trainer in waiting)
            beside = tuple(trainer for trainer in waiting if trainer.epoch == epoch)
            if steps is None or steps.trainers != beside:
                steps = Steps(beside)
            _train_epoch(steps)


def _train_epoch(steps: Steps) -> None:
    trainers, lead = list(steps.trainers), steps.trainers[0]
    cfg, count = lead.cfg, lead.steps_per_epoch
    clock = _Clock()
    desc = f"epoch {lead.epoch + 1}/{cfg.SOLVER.EPOCHS}"
    bar = Progress(desc, count * cfg.SOLVER.BATCH_SIZE, unit_scale=True)
    for trainer in trainers:
        trainer.start_epoch()
    with bar:
        for step, inputs in enumerate(steps.inputs(clock.watch(steps.batches()))):
            steps.run(inputs, step)
            clock.count_step()
            bar.update(cfg.SOLVER.BATCH_SIZE)
            if (step + 1) % cfg.LOG_EVERY == 0 or step + 1 == count:
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


class _Clock:
    """Times an epoch on the host; the first step, which warms up, does not count for the rate."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._warm = self._start
        self._steps = 0
        self._waiting = 0.0

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches; what they take to come is time in data."""
        asked = time.perf_counter()
        for batch in batches:
            self._waiting += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def count_step(self) -> None:
        """A step was made."""
        if self._steps == 0:
            self._warm = time.perf_counter()
        self._steps += 1

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
