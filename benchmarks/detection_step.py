"""What distillation adds to a detector's training step: ``python -m benchmarks.detection_step``.

RetinaNet R101 -> R50, batch 2, random weights and images, float32. In every round, one after the
other: the student's step alone, the teacher's backbone forward, and the distilled step of each
method; medians over the rounds. The bound is student step + teacher forward, since both have to
run whatever the method is.

The peak of each is measured as :mod:`benchmarks.memory` does it, before the timing, in a process
of its own that has built the whole distilled model: weights and images are excluded in every row,
the gradients of the weights are included. What a method's peak exceeds that of the student's step
by is the memory that it adds, beyond the teacher's weights. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import detection.meta_arch  # noqa: F401  (registers itself)
from benchmarks.harness import markdown
from benchmarks.memory import in_fresh_process
from detection.config import PROJECT, load_config
from pcka.analysis.memory import peak_growth

CONFIG = PROJECT / "configs/detection/coco/retinanet_r50/from_r101_pcka.yaml"
METHODS = ("PCKA", "PKD", "CWD", "FITNET")
STUDENT, TEACHER = "student step", "teacher forward"
BATCH = 2
OBJECTS = 8
WARM_UP_SIDE = 128
MIB = 1 << 20
Step = Callable[[], Any]


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure and print the table; returns of each step ``ms`` by round and ``peak_bytes``."""
    parser = argparse.ArgumentParser(description="Cost of the distilled step.")
    parser.add_argument("--short-side", type=int, default=480)
    parser.add_argument("--long-side", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="configuration")
    given = parser.parse_args(arguments)
    peaks = _peaks(given) if sys.platform.startswith("linux") else {}
    batch = _batch(given.short_side, given.long_side)
    with EventStorage():
        times = _time(_steps(*_build(given.methods, given.opts), batch), given.rounds)
    print(
        f"{given.short_side} x {given.long_side}, batch {BATCH}, {torch.get_num_threads()} threads"
    )
    print(_table(times, peaks))
    return {name: {"ms": ms, "peak_bytes": peaks.get(name)} for name, ms in times.items()}


def measure(task: str) -> None:
    """Print the peak growth of a step in bytes. Runs in a process of its own; ``task`` is JSON."""
    warnings.simplefilter("ignore")  # levels that are too small for a patch while warming up
    settings = json.loads(task)
    torch.set_num_threads(settings["threads"])
    model, losses = _build([settings["method"]], settings["opts"])
    with EventStorage():
        _steps(model, losses, _batch(WARM_UP_SIDE, WARM_UP_SIDE))[settings["step"]]()
        model.zero_grad(set_to_none=True)
        print(peak_growth(_steps(model, losses, _batch(*settings["size"]))[settings["step"]]))


def _peaks(given: argparse.Namespace) -> dict[str, int]:
    """Step -> bytes."""
    models = {STUDENT: given.methods[0], TEACHER: given.methods[0], **{m: m for m in given.methods}}
    shared = {
        "size": [given.short_side, given.long_side],
        "opts": given.opts,
        "threads": torch.get_num_threads(),
    }
    return {
        step: in_fresh_process("detection_step", {"step": step, "method": method, **shared})
        for step, method in models.items()
    }


def _config(method: str, opts: Sequence[str]) -> CfgNode:
    return load_config(
        str(CONFIG),
        ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "DISTILL.METHODS", str([method]),
         "DISTILL.TEACHER.WEIGHTS", "", "DISTILL.TEACHER.RANDOM_WEIGHTS", "True",
         "DISTILL.LOG_PERIOD", "0", *opts],
    )  # fmt: skip


def _build(methods: Sequence[str], opts: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """A distilled model, and the losses of each method for it."""
    model: Any = build_model(_config(methods[0], opts)).train()
    losses = {methods[0]: model.losses}
    losses |= {method: build_model(_config(method, opts)).losses for method in methods[1:]}
    return model, losses


def _steps(model: Any, losses: Mapping[str, Any], batch: list[dict[str, Any]]) -> dict[str, Step]:
    """Name -> one step; all distilled steps share one student and one teacher."""
    images = [entry["image"] for entry in batch]
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    step = model.student.backbone.size_divisibility
    canvas = (-(-height // step) * step, -(-width // step) * step)

    def train(forward: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]) -> None:
        model.zero_grad(set_to_none=True)
        torch.stack([term.sum() for term in forward(batch).values()]).sum().backward()

    def distilled(method: str) -> Step:
        def run() -> None:
            model.losses = losses[method]
            train(model)

        return run

    steps: dict[str, Step] = {
        STUDENT: lambda: train(model.student),
        TEACHER: lambda: model.teacher(images, canvas),
    }
    return steps | {method: distilled(method) for method in losses}


def _batch(short: int, long: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    entries = []
    for _ in range(BATCH):
        corners = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([long, short]) * 0.6
        sizes = 20 + torch.rand(OBJECTS, 2, generator=generator) * 0.35 * short
        instances = Instances((short, long))
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sizes], dim=1))
        instances.gt_classes = torch.randint(80, (OBJECTS,), generator=generator)
        image = torch.randint(256, (3, short, long), generator=generator, dtype=torch.uint8)
        entries.append({"image": image, "instances": instances})
    return entries


def _time(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step in each round; an untimed round comes first."""
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    for timed in (False, *[True] * rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if timed:
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return milliseconds


def _table(times: Mapping[str, Sequence[float]], peaks: Mapping[str, int]) -> str:
    """Markdown; the ratio is that of a round to its bound, the student's step + the teacher's."""
    bound = [sum(pair) for pair in zip(times[STUDENT], times[TEACHER])]
    rows = []
    for name, milliseconds in times.items():
        ratio = statistics.median(own / floor for own, floor in zip(milliseconds, bound))
        row = [name, f"{statistics.median(milliseconds):.0f}", f"{ratio:.3f}"]
        if peaks:
            added = "" if name in (STUDENT, TEACHER) else _mib(peaks[name] - peaks[STUDENT])
            row += [_mib(peaks[name]), added]
        rows.append(row)
    memory = ["peak (MiB)", "beyond the student's step (MiB)"] if peaks else []
    return markdown(["", "ms", "ratio to student step + teacher forward", *memory], rows)


def _mib(size: int) -> str:
    return str(round(size / MIB))


if __name__ == "__main__":
    main()
