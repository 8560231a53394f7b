"""What distillation adds to a detector's training step: ``python -m benchmarks.detection_step``.

RetinaNet R101 -> R50, batch 2, random weights and images, float32. In every round, one after the
other: the student's step alone, the teacher's backbone forward, and the distilled step of each
method; medians over the rounds. The bound is student step + teacher forward, since both have to
run whatever the method is.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import detection.meta_arch  # noqa: F401  (registers itself)
from detection.config import PROJECT, load_config

CONFIG = PROJECT / "configs/detection/coco/retinanet_r50/from_r101_pcka.yaml"
METHODS = ("PCKA", "PKD", "CWD", "FITNET")
BATCH = 2
OBJECTS = 8
Step = Callable[[], Any]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Cost of the distilled step.")
    parser.add_argument("--short-side", type=int, default=480)
    parser.add_argument("--long-side", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    given = parser.parse_args()
    batch = _batch(given.short_side, given.long_side)
    with EventStorage():
        _report(_time(_steps(given.methods, batch), given.rounds), given)


def _config(method: str) -> CfgNode:
    return load_config(
        str(CONFIG),
        ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "DISTILL.METHODS", str([method]),
         "DISTILL.TEACHER.WEIGHTS", "", "DISTILL.TEACHER.RANDOM_WEIGHTS", "True",
         "DISTILL.LOG_PERIOD", "0"],
    )  # fmt: skip


def _steps(methods: list[str], batch: list[dict[str, Any]]) -> dict[str, Step]:
    """Name -> one step; all distilled steps share one student and one teacher."""
    model: Any = build_model(_config(methods[0])).train()
    own = {methods[0]: model.losses}
    own |= {method: build_model(_config(method)).losses for method in methods[1:]}
    images = [entry["image"] for entry in batch]
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    step = model.student.backbone.size_divisibility
    canvas = (-(-height // step) * step, -(-width // step) * step)

    def train(forward: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]) -> None:
        model.zero_grad(set_to_none=True)
        torch.stack([term.sum() for term in forward(batch).values()]).sum().backward()

    def distilled(method: str) -> Step:
        def run() -> None:
            model.losses = own[method]
            train(model)

        return run

    steps: dict[str, Step] = {
        "student step": lambda: train(model.student),
        "teacher forward": lambda: model.teacher(images, canvas),
    }
    return steps | {method: distilled(method) for method in methods}


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


def _time(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step in each round; an untimed round comes first."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for timed in (False, *[True] * rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if timed:
                seconds[name].append(1e3 * (time.perf_counter() - start))
    return seconds


def _report(times: dict[str, list[float]], given: argparse.Namespace) -> None:
    print(
        f"{given.short_side} x {given.long_side}, batch {BATCH}, {torch.get_num_threads()} threads"
    )
    bound = [sum(pair) for pair in zip(times["student step"], times["teacher forward"])]
    print("| | ms | ratio to student step + teacher forward |\n| --- | --- | --- |")
    for name, milliseconds in times.items():
        ratios = [own / floor for own, floor in zip(milliseconds, bound)]
        print(
            f"| {name} | {statistics.median(milliseconds):.0f} | {statistics.median(ratios):.3f} |"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of the process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
