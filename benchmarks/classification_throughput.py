"""Images a second of CIFAR trainings: eager, recorded as a CUDA graph, compiled, side by side.

``python -m benchmarks.classification_throughput [--runs NAME...] [--seconds S] [--output DIR]``.
The trainer's own steps, data and teacher included, on random images of CIFAR's size with a
resnet56 of random weights as the teacher. A run trains one student or several side by side.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.classification_step import configure, random_images
from benchmarks.harness import markdown
from benchmarks.report import write
from classification.environment import choose_device, describe_environment
from classification.experiment import prepare_trainers
from classification.steps import Steps

IMAGES = 51_200  # an epoch of CIFAR-100's length


@dataclass(frozen=True)
class Run:
    """Students that train side by side.

    Attributes:
        methods: of each student.
        student: their network; the teacher is a resnet56.
        batch: images of a step.
        graph: the step is recorded.
        compile: and compiled before.
    """

    methods: tuple[str, ...]
    student: str = "resnet20"
    batch: int = 64
    graph: bool = True
    compile: bool = False

    def overrides(self) -> list[str]:
        """As words of a command line."""
        values = {
            "AUTOCAST": "auto",
            "CHANNELS_LAST": True,
            "CUDA_GRAPH": self.graph,
            "COMPILE": self.compile,
            "STUDENT.NAME": self.student,
            "SOLVER.BATCH_SIZE": self.batch,
            "LOG_EVERY": 1000,
        }
        return [str(word) for pair in values.items() for word in pair]


FOUR = ("ce", "kd", "rcka", "kd_fcka")
RUNS = {
    "kd, eager": Run(("kd",), graph=False),
    "kd": Run(("kd",)),
    "rcka": Run(("rcka",)),
    "ce": Run(("ce",)),
    "four": Run(FOUR),
    "eight": Run((*FOUR, "dkd", "dist", "sp", "pkd")),
    "resnet56": Run(("ce",), "resnet56"),
    "resnet56, batch 128": Run(("ce",), "resnet56", 128),
    "resnet56, compiled": Run(("ce",), "resnet56", compile=True),
    "kd, compiled": Run(("kd",), compile=True),
    "four, compiled": Run(FOUR, compile=True),
}


def measure(run: Run, seconds: float, images: int, folder: Path) -> dict[str, float]:
    """Milliseconds of a step, images a second (of each student, summed), and seconds to start."""
    sets = random_images(images, 100)
    cfgs = [configure(m, folder, *run.overrides()) for m in run.methods]
    device = choose_device(cfgs[0].DEVICE)
    started = time.perf_counter()
    steps = Steps(prepare_trainers(cfgs, device, sets))
    stream = _endless(steps)

    def advance(number: int) -> float:
        """Seconds for so many steps."""
        _synchronize(device)
        start = time.perf_counter()
        for step, inputs in zip(range(number), stream):
            steps.run(inputs, step)
        _synchronize(device)
        return time.perf_counter() - start

    advance(2 * 8 + 1)
    start_up = time.perf_counter() - started
    per_step = advance(8) / 8
    number = max(8, int(seconds / 3 / per_step))
    per_step = sorted(advance(number) / number for _ in range(3))[1]
    return {
        "ms_per_step": 1000 * per_step,
        "images_per_second": run.batch * len(run.methods) / per_step,
        "start_up_seconds": start_up,
        "epochs_240_seconds": 240 * 50_000 / run.batch * per_step,
    }


def _endless(steps: Steps) -> Iterator:
    for _ in count():
        yield from steps.inputs(steps.batches())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure each run in its turn, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=6, help="timed for each run")
    parser.add_argument("--images", type=int, default=IMAGES, help="of an epoch")
    parser.add_argument("--output", type=Path, help="folder for classification_throughput.json")
    options = parser.parse_args()
    records = []
    environment = describe_environment(0, choose_device("auto"))
    with TemporaryDirectory() as folder:
        for name in options.runs:
            figures = measure(RUNS[name], options.seconds, options.images, Path(folder))
            records.append({"run": name, **asdict(RUNS[name]), **figures})
            print(name, {key: round(value, 3) for key, value in figures.items()}, flush=True)
            write(options.output, "classification_throughput", environment, records)
            gc.collect()  # of graphs and their memory
    rows = [
        [r["run"], f"{r['ms_per_step']:.3f}", f"{r['images_per_second']:,.0f}"] for r in records
    ]
    print(markdown(["run", "ms a step", "images a second"], rows))


if __name__ == "__main__":
    main()
