"""Images per second of CIFAR training: eager, recorded as a CUDA graph, compiled, side by side.

``python -m benchmarks.classification_throughput [--runs NAME...] [--seconds S] [--device cpu]``.
Times the trainer's own steps, data and teacher included, on random images of CIFAR's size, with a
resnet56 with random weights as the teacher. A run trains one student or several side by side.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import report
from benchmarks.classification_step import configure, random_images
from benchmarks.harness import markdown
from classification.run import Run as TrainingRun
from classification.run import prepare
from classification.sweep import SideBySide, Sweep

IMAGES = 51_200  # about the length of a CIFAR-100 epoch


@dataclass(frozen=True)
class Run:
    """Students that train side by side.

    Attributes:
        methods: method of each student.
        student: their network; the teacher is a resnet56.
        batch: images per step.
        graph: whether the step is recorded.
        compile: whether it is compiled first.
        settings: further ``KEY VALUE`` words.
    """

    methods: tuple[str, ...]
    student: str = "resnet20"
    batch: int = 64
    graph: bool = True
    compile: bool = False
    settings: tuple[str, ...] = ()

    def overrides(self) -> list[str]:
        """Return the settings as words of a command line."""
        values = {
            "AUTOCAST": "auto",
            "CHANNELS_LAST": True,
            "CUDA_GRAPH": self.graph,
            "COMPILE": self.compile,
            "STUDENT.NAME": self.student,
            "SOLVER.BATCH_SIZE": self.batch,
            "LOG_EVERY": 1000,
        }
        return [*(str(word) for pair in values.items() for word in pair), *self.settings]


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
QUICK_RUNS = ("kd, eager", "ce")


def measure(run: Run, on: str, seconds: float, images: int, folder: Path) -> dict[str, float]:
    """Return milliseconds per step, images per second (summed over students), seconds to start."""
    sets = random_images(images, 100)
    cfgs = [configure(m, folder, *run.overrides()) for m in run.methods]
    device = torch.device(on)
    started = time.perf_counter()
    sweep, trainers = Sweep(), []
    for trainer in prepare([TrainingRun(cfg) for cfg in cfgs], device, sets):
        sweep.add(trainer)
        trainers.append(trainer)
    beside = trainers[0] if len(trainers) == 1 else SideBySide(tuple(trainers), sweep)
    stream = _endless(beside)

    def advance(number: int) -> float:
        """Run ``number`` steps; return the seconds they took."""
        _synchronize(device)
        start = time.perf_counter()
        for step, inputs in zip(range(number), stream):
            beside.step(inputs, step)
        _synchronize(device)
        return time.perf_counter() - start

    advance(3)  # records the step, or compiles it
    start_up = time.perf_counter() - started
    per_step = advance(4) / 4
    number = max(1, int(seconds / 3 / per_step))
    per_step = sorted(advance(number) / number for _ in range(3))[1]
    return {
        "ms_per_step": 1000 * per_step,
        "images_per_second": run.batch * len(run.methods) / per_step,
        "start_up_seconds": start_up,
        "epochs_240_seconds": 240 * 50_000 / run.batch * per_step,
    }


def _endless(beside: Any) -> Iterator[Any]:
    for _ in count():
        yield from beside.inputs(beside.batches())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one run after another, and print a table."""
    parser = report.parser("Images a second of CIFAR trainings.")
    report.add_device(parser)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=5, help="timed per run")
    options = parser.parse_args(arguments)
    environment = report.start(options.device, options)
    seconds, images = (0.0, 64) if options.quick else (options.seconds, IMAGES)
    records: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for name in options.runs or (QUICK_RUNS if options.quick else RUNS):
            run = replace(RUNS[name], batch=8) if options.quick else RUNS[name]
            try:
                figures = measure(run, options.device, seconds, images, Path(folder))
            except RuntimeError as error:  # keep the results of the others
                print(f"{name}: {error}", flush=True)
                records.append({"run": name, **asdict(run), "error": str(error)})
            else:
                records.append({"run": name, **asdict(run), **figures})
                line = ", ".join(f"{key} {value:,.4g}" for key, value in figures.items())
                print(f"{name}: {line}", flush=True)
            report.write(
                options.output, "classification_throughput", environment, records, _lines(records)
            )
            gc.collect()  # frees graphs and their memory
    rows = [
        [r["run"], f"{r['ms_per_step']:.3f}", f"{r['images_per_second']:,.0f}"]
        for r in records
        if "error" not in r
    ]
    print(markdown(["run", "ms a step", "images a second"], rows))
    if any("error" in record for record in records):
        raise SystemExit(1)


def _lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line of figures per run."""
    return [
        f"{r['run']}: {r.get('error', '')}"
        if "error" in r
        else f"{r['run']}: {r['ms_per_step']:.3f} ms a step, {r['images_per_second']:,.0f} images/s"
        for r in records
    ]


if __name__ == "__main__":
    main()
