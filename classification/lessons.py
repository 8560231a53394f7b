"""The teacher's outputs on training batches, computed once for all students that share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from typing import TYPE_CHECKING, TypeVar

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from classification.data import Batch, pixel_statistics
from pcka.distiller import Distiller
from pcka.engine.config import ConfigError
from pcka.engine.cuda_graph import Recorded
from pcka.engine.environment import autocast
from pcka.losses import Outputs
from pcka.taps import Observer

if TYPE_CHECKING:
    from classification.teacher_outputs import KeptOutputs

AHEAD = 8  # batches per forward pass of a recorded teacher
AHEAD_IMAGES = 2048  # per forward pass, at most

T = TypeVar("T")


@dataclass(frozen=True)
class StepInputs:
    """What a step trains on.

    Attributes:
        images: (B, 3, S, S), float32 in [0, 1].
        labels: (B,) int64, or (B, P) class probabilities of mixed images.
        indices: (B,) int64, positions in the training set.
        teacher: the teacher's outputs on the same samples, or None if no loss needs them.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    teacher: Outputs | None


class Lessons:
    """The teacher's outputs on the batches of a training run.

    If a step can be a CUDA graph, so is the teacher, which then processes several batches at once,
    ahead of the students. It does not run for batches whose outputs are kept on disk.

    Args:
        cfg: AUTOCAST, CHANNELS_LAST, COMPILE, SOLVER.BATCH_SIZE and the teacher's pixel statistics.
        learners: for each batch of a step, the students that train on it.
        device: the training device.
        obstacle: why a step cannot be recorded; "" if not requested, None if it can be.
        ahead: batches per forward pass, at most.
        kept: the teacher's outputs on disk; None if they are not kept.
        seeds: the ``SEED`` of each batch of a step, for ``kept``.
    """

    def __init__(
        self,
        cfg: CfgNode,
        learners: Sequence[Sequence[Distiller]],
        device: torch.device,
        *,
        obstacle: str | None,
        ahead: int = AHEAD,
        kept: KeptOutputs | None = None,
        seeds: Sequence[int] = (),
    ) -> None:
        self._cfg, self._device = cfg, device
        self._taught = [any(learner.runs_teacher for learner in group) for group in learners]
        students = [learner for group in learners for learner in group]
        self._taps = _shared_taps(students)
        self._observe = _shared_observer(students, cfg.COMPILE)
        self._pixels = pixel_statistics(cfg.TEACHER).to(device)
        self._ask = Recorded(self._answer, obstacle=None if obstacle is None else "")
        images = cfg.SOLVER.BATCH_SIZE * max(1, sum(self._taught))
        self._ahead = 1 if self._ask.is_plain else max(1, min(ahead, AHEAD_IMAGES // images))
        self._kept, self._seeds = kept, seeds

    def over(
        self, steps: Iterable[Sequence[Batch]], epoch: int | None = None
    ) -> Iterator[list[StepInputs]]:
        """Yield the batches of each step with the teacher's outputs on them.

        Args:
            steps: the batches of each step.
            epoch: their epoch, 0 for the first; needed if the teacher's outputs are kept.
        """
        for group, taught in self._answers(steps, epoch):
            for step, outputs in zip(group, taught, strict=True):
                yield [
                    StepInputs(batch.images, batch.labels, batch.indices, of_teacher)
                    for batch, of_teacher in zip(step, outputs, strict=True)
                ]

    def _answers(
        self, steps: Iterable[Sequence[Batch]], epoch: int | None
    ) -> Iterator[tuple[list[Sequence[Batch]], Iterable[list[Outputs | None]]]]:
        """Yield the steps in groups, with the teacher's outputs on the batches of each.

        With kept outputs, the teacher only runs for groups of which some are missing. What it adds
        is read back, too, so that resumed and later runs train on the same bits.
        """
        kept = self._kept
        if self._observe is None or epoch is None or kept is None:
            for group in _in_groups(steps, self._ahead):
                yield group, self._teach(group)
            return
        from classification.teacher_outputs import StepOutputs, with_positions

        taught = zip(self._seeds, self._taught, strict=True)
        outputs_of = StepOutputs(
            [kept.epoch(seed, epoch, self._taps) if asked else None for seed, asked in taught]
        )
        for located in _in_groups(with_positions(steps), self._ahead):
            batches, positions = [step for step, _ in located], [where for _, where in located]
            if not all(map(outputs_of.knows, positions)):
                for of_step, outputs in zip(positions, self._teach(batches), strict=True):
                    outputs_of.keep(of_step, outputs)
            yield batches, [outputs_of.read(of_step, self._device) for of_step in positions]
        outputs_of.write()

    def _teach(self, group: list[Sequence[Batch]]) -> Iterable[list[Outputs | None]]:
        """Return the outputs on the batches of some steps; None where they are not needed."""
        if self._observe is None:
            return [[None] * len(step) for step in group]
        padded = group + group[-1:] * (self._ahead - len(group))  # a graph has one shape
        images = [batch.images for step in padded for batch in compress(step, self._taught)]
        outputs = self._ask(images[0] if len(images) == 1 else torch.cat(images))
        parts = _split(outputs, len(images), len(images[0]))
        return [[next(parts) if taught else None for taught in self._taught] for _ in group]

    def _answer(self, images: Tensor) -> Outputs:
        """Return the teacher's outputs on images (B, 3, S, S) in [0, 1]."""
        assert self._observe is not None  # otherwise not called
        layout = torch.channels_last if self._cfg.CHANNELS_LAST else torch.contiguous_format
        with autocast(self._cfg.AUTOCAST, images.device):
            return self._observe(self._pixels(images).contiguous(memory_format=layout))


def _in_groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while group := list(islice(items, size)):
        yield group


def _shared_taps(students: Sequence[Distiller]) -> dict[str, str]:
    """Return tap name -> path in the teacher, for all that the students read.

    Raises:
        ConfigError: students use the same tap for different modules of the teacher.
    """
    paths: dict[str, str] = {}
    learners = [student for student in students if student.runs_teacher]
    for tap, path in (item for learner in learners for item in learner.teacher_paths.items()):
        if paths.setdefault(tap, path) != path:
            raise ConfigError(
                f"DISTILL.TAPS: {tap!r} is {paths[tap]!r} of the teacher for one student and "
                f"{path!r} for another one; give them different names"
            )
    return paths


def _shared_observer(students: Sequence[Distiller], compile: bool) -> Observer | None:
    """Return the teacher with the taps of all students, or None if no student needs it."""
    teachers = [student.teacher for student in students if student.runs_teacher]
    if not teachers or teachers[0] is None:
        return None
    return teachers[0].observer(_shared_taps(students), compile=compile)


def _split(outputs: Outputs, parts: int, size: int) -> Iterator[Outputs]:
    """Yield ``parts`` pieces of ``size`` samples."""
    for start in range(0, parts * size, size):
        piece = slice(start, start + size)
        logits = None if outputs.logits is None else outputs.logits[piece]
        yield Outputs(logits, {name: x[piece] for name, x in outputs.features.items()})
