"""What distillation adds to a detector's training step: ``python -m benchmarks.detection_step``.

RetinaNet R101 -> R50, or another pair without masks (``--config-file``), on random weights and
images. Every round runs the student's step alone, the teacher's forward pass, and the distilled
step of each method in turn; results are medians over the rounds. The bound is student step +
teacher forward, since both have to run whatever the method. The teacher is its backbone and, for
methods that read it, its head.
On a GPU each step lies between two synchronisations.

On a CPU, the peak memory of each is measured before the timing, as in :mod:`benchmarks.memory`, in
a separate process that has built the whole distilled model (Linux only); on a GPU it is the
allocator's peak. Weights and images are excluded in every row, the gradients of the weights are
included. The difference between the peaks of a method and of the student's step is the memory that
the method adds, beyond the teacher's weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import detection.meta_arch  # noqa: F401  (registers itself)
from benchmarks import device, report
from benchmarks.harness import markdown
from benchmarks.memory import in_fresh_process
from detection.config import PROJECT, load_config
from detection.data.register import class_count
from detection.levels import needs_head
from pcka.analysis.memory import peak_growth

CONFIG = PROJECT / "configs/detection/coco/retinanet_r50/from_r101_pcka.yaml"
METHODS = ("PCKA", "PKD", "CWD", "FITNET")
STUDENT, TEACHER = "student step", "teacher forward"
OBJECTS = 8
WARM_UP_SIDE = 128
WARM_UP_ROUNDS = 3  # TorchScript profiles the first calls of the focal loss, then compiles it
MIB = 1 << 20
# For a rehearsal: a detector so small that a step takes a second.
TINY = [
    "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64",
    "MODEL.FPN.OUT_CHANNELS", "16", "DISTILL.TEACHER.OPTS",
    str(["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
         "MODEL.FPN.OUT_CHANNELS", 16]),
]  # fmt: skip
Step = Callable[[], Any]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and print the tables; return one record per batch size."""
    parser = report.parser("Cost of the distilled step.")
    report.add_device(parser, default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[2])
    parser.add_argument("--autocast", choices=["bfloat16"], help="for both models' forward pass")
    parser.add_argument("--short-side", type=int, default=480)
    parser.add_argument("--long-side", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--config-file", default=str(CONFIG), help="a distilled detector")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), metavar="M", help="losses; PCKA+FGD is a sum"
    )
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="configuration")
    given = parser.parse_args(arguments)
    if len({needs_head(_summands(method)) for method in given.methods}) > 1:
        parser.error("--methods: give those that read the teacher's head in a call of their own")
    environment = report.start(given.device, given)
    if given.quick:
        given.short_side, given.long_side, given.rounds = 160, 192, 1
        given.batch = sorted({min(batch, 3) for batch in given.batch})
        given.opts = [*TINY, *given.opts]
    peaks = _peaks(given) if given.device == "cpu" and sys.platform.startswith("linux") else {}
    model, losses = _build(given.config_file, given.methods, given.opts, given.device)
    records = []
    for batch in given.batch:
        try:
            records.append(_record(model, losses, batch, given, peaks if batch == 2 else {}))
        except torch.OutOfMemoryError as error:
            print(f"batch {batch}: {str(error).splitlines()[0]}")
            continue
        lines = [line for entry in records for line in _summary(entry)]
        report.write(given.output, "detection_step", environment, records, lines)
    return records


def _record(
    model: Any,
    losses: Mapping[str, Any],
    batch: int,
    given: argparse.Namespace,
    peaks: Mapping[str, int],
) -> dict[str, Any]:
    """Return ``steps``: name -> ``ms`` by round and ``peak_bytes``; also print the table."""
    classes = class_count(load_config(given.config_file, given.opts))
    images = random_batch(batch, given.short_side, given.long_side, classes=classes)
    with EventStorage():
        steps = _steps(model, losses, images, given.autocast)
        times = _time(steps, given.rounds, given.device)
        if given.device == "cuda":
            peaks = {name: _peak_on_gpu(model, step) for name, step in steps.items()}
    size = f"{given.short_side} x {given.long_side}"
    precision = f"autocast to {given.autocast}" if given.autocast else "float32"
    print(f"{size}, batch {batch}, {precision}, {given.device}, {torch.get_num_threads()} threads")
    print(_table(times, peaks), flush=True)
    return {
        "size": size,
        "batch": batch,
        "precision": precision,
        "steps": {name: {"ms": ms, "peak_bytes": peaks.get(name)} for name, ms in times.items()},
    }


def _peak_on_gpu(model: Any, step: Step) -> int:
    """Return the peak bytes beyond weights and images."""
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _summary(entry: Mapping[str, Any]) -> list[str]:
    """Return one line per method: its step, the bound's parts, and its own share of the step."""
    medians = {name: statistics.median(step["ms"]) for name, step in entry["steps"].items()}
    own, other = medians.pop(STUDENT), medians.pop(TEACHER)
    return [
        f"{entry['size']}, batch {entry['batch']}: student {own:.1f} ms, teacher {other:.1f} ms, "
        f"with {name} {ms:.1f} ms ({100 * (ms - own - other) / ms:.1f} % its own)"
        for name, ms in medians.items()
    ]


def measure(task: str) -> None:
    """Print the peak growth of a step in bytes. Runs in a separate process; ``task`` is JSON."""
    warnings.simplefilter("ignore")  # of levels too small for a patch during the warm-up
    settings = json.loads(task)
    torch.set_num_threads(settings["threads"])
    model, losses = _build(settings["config_file"], [settings["method"]], settings["opts"], "cpu")
    with EventStorage():
        steps = partial(_steps, model, losses, autocast=settings["autocast"])
        steps(random_batch(2, WARM_UP_SIDE, WARM_UP_SIDE))[settings["step"]]()
        model.zero_grad(set_to_none=True)
        print(peak_growth(steps(random_batch(2, *settings["size"]))[settings["step"]]))


def _peaks(given: argparse.Namespace) -> dict[str, int]:
    """Return step -> peak bytes, at batch 2."""
    models = {STUDENT: given.methods[0], TEACHER: given.methods[0], **{m: m for m in given.methods}}
    shared = {
        "size": [given.short_side, given.long_side],
        "config_file": given.config_file,
        "opts": given.opts,
        "autocast": given.autocast,
        "threads": torch.get_num_threads(),
    }
    return {
        step: in_fresh_process("detection_step", {"step": step, "method": method, **shared})
        for step, method in models.items()
    }


def _summands(method: str) -> list[str]:
    return method.split("+")


def _config(file: str, method: str, opts: Sequence[str], on: str) -> CfgNode:
    return load_config(
        file,
        ["MODEL.WEIGHTS", "", "MODEL.DEVICE", on, "DISTILL.METHODS", str(_summands(method)),
         "DISTILL.TEACHER.WEIGHTS", "", "DISTILL.TEACHER.RANDOM_WEIGHTS", "True",
         "DISTILL.LOG_PERIOD", "0", *opts],
    )  # fmt: skip


def _build(
    file: str, methods: Sequence[str], opts: Sequence[str], on: str
) -> tuple[Any, dict[str, Any]]:
    """Return a distilled model whose features serve all methods, and the losses of each."""
    every = "+".join(dict.fromkeys(loss for method in methods for loss in _summands(method)))
    model: Any = build_model(_config(file, every, opts, on)).train()
    apart = {method: build_model(_config(file, method, opts, on)) for method in methods}
    return model, {method: one.distiller.losses for method, one in apart.items()}


def _steps(
    model: Any, losses: Mapping[str, Any], batch: list[dict[str, Any]], autocast: str | None
) -> dict[str, Step]:
    """Return name -> one step; all distilled steps share one student and one teacher."""
    images = [entry["image"] for entry in batch]
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    step = model.student.backbone.size_divisibility
    canvas = (-(-height // step) * step, -(-width // step) * step)
    precision = partial(torch.autocast, model.device.type, torch.bfloat16, enabled=bool(autocast))

    def train(forward: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]) -> None:
        model.zero_grad(set_to_none=True)
        with precision():
            terms = forward(batch)
        torch.stack([term.sum() for term in terms.values()]).sum().backward()

    def distilled(method: str) -> Step:
        def run() -> None:
            model.distiller.losses = losses[method]
            train(model)

        return run

    def teach() -> None:
        with precision():
            model.teacher(images, canvas)

    steps: dict[str, Step] = {STUDENT: lambda: train(model.student), TEACHER: teach}
    return steps | {method: distilled(method) for method in losses}


def random_batch(number: int, short: int, long: int, *, classes: int = 3) -> list[dict[str, Any]]:
    """Return random images with random boxes, as detectron2's detectors take them in training."""
    generator = torch.Generator().manual_seed(0)
    entries = []
    for _ in range(number):
        corners = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([long, short]) * 0.6
        sizes = 20 + torch.rand(OBJECTS, 2, generator=generator) * 0.35 * short
        instances = Instances((short, long))
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sizes], dim=1))
        instances.gt_classes = torch.randint(classes, (OBJECTS,), generator=generator)
        image = torch.randint(256, (3, short, long), generator=generator, dtype=torch.uint8)
        entries.append({"image": image, "instances": instances})
    return entries


def _time(steps: Mapping[str, Step], rounds: int, on: str) -> dict[str, list[float]]:
    """Return the milliseconds of each step in each round, after untimed rounds."""
    clock = device.timer(on)
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-(WARM_UP_ROUNDS if on == "cuda" else 1), rounds):
        for name, step in steps.items():
            taken = 1e3 * clock(step, 1)
            if turn >= 0:
                milliseconds[name].append(taken)
    return milliseconds


def _table(times: Mapping[str, Sequence[float]], peaks: Mapping[str, int]) -> str:
    """Return a Markdown table; ratios are to each round's student step + teacher forward."""
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
