"""Cost of a step whose teacher is read from disk, compared with one whose teacher runs.

``python -m benchmarks.teacher_outputs [--rounds R]``. resnet56 -> resnet8 by KD on random images of
CIFAR's size, batch 64, data included; steps take turns. Cross-entropy alone is the cost without a
teacher.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.classification_step import TEACHER, configure, random_images
from benchmarks.harness import Spread, interleave, markdown, ratio
from classification.lessons import StepInputs
from classification.run import prepare_trainers
from classification.trainer import Trainer
from pcka.engine.environment import choose_device

STUDENT = "resnet8"


def inputs_of(trainer: Trainer) -> Iterator[StepInputs]:
    """Yield the batches of the first epoch with the teacher's outputs, repeatedly."""
    while True:
        yield from trainer.inputs(trainer.batches())


def step(trainer: Trainer, inputs: Iterator[StepInputs]) -> None:
    """Run one step, as in ``classification/train.py``."""
    trainer.step(next(inputs), 0)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--images", type=int, default=6_400)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    device, sets = choose_device("auto"), random_images(given.images, 100)
    with TemporaryDirectory() as folder:
        words = ["STUDENT.NAME", STUDENT, "AUTOCAST", ""]
        kept = ["TEACHER.OUTPUTS", str(Path(folder) / "outputs")]
        variants = {"live": ("kd", []), "from disk": ("kd", kept), "cross-entropy": ("ce", [])}
        cfgs = [configure(method, Path(folder), *words, *own) for method, own in variants.values()]
        trainers = {
            name: prepare_trainers([cfg], device, sets)[0]
            for name, cfg in zip(variants, cfgs, strict=True)
        }
        keeping = trainers["from disk"]
        for _ in keeping.inputs(keeping.batches()):  # stores what an earlier training would leave
            pass
        calls = {name: partial(step, t, inputs_of(t)) for name, t in trainers.items()}
        seconds = interleave(calls, dict.fromkeys(calls, given.rounds))
    rows = [
        [name, str(Spread.of([1000 * s for s in times])), str(ratio(seconds["live"], times))]
        for name, times in seconds.items()
    ]
    print(f"{TEACHER} -> {STUDENT}, batch 64, {device}, {given.threads} threads")
    print(markdown(["teacher", "ms", "live / it"], rows))
    return seconds


if __name__ == "__main__":
    main()
