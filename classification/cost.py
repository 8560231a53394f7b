"""What a training step of each method costs: time an image, and memory at its peak."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from classification.data import Batch
from classification.environment import describe_environment
from classification.experiment import ImageSets, prepare_trainers
from classification.launch import process_group
from classification.run_files import write_text
from classification.steps import Steps
from classification.trainer import Trainer
from pcka.analysis.memory import peak_growth
from pcka.distributed import from_first_process, rank

ROUNDS, WARM_UP_ROUNDS = 15, 2


@dataclass(frozen=True)
class Cost:
    """Of one training step: its batch, the teacher's forward pass, the student's update.

    Attributes:
        milliseconds: for each image, the median over the rounds.
        mebibytes: that memory grows by at the peak of the step, beside models and optimizer.
    """

    milliseconds: float
    mebibytes: float


def measure_costs(
    cfgs: Mapping[str, CfgNode],
    path: Path,
    *,
    rounds: int = ROUNDS,
    image_sets: ImageSets | None = None,
) -> dict[str, Cost]:
    """Time the methods' steps in turns, so that what slows the machine down slows all of them down.

    Args:
        cfgs: method -> configuration; they differ in ``DISTILL`` and ``OUTPUT_DIR`` only.
        path: where the costs are kept; nothing is measured where it has those of all methods with
            the same settings.
        rounds: timed steps of each method.
        image_sets: training and evaluation images where they are in memory already.
    """
    lead = next(iter(cfgs.values()))
    with process_group(lead.DEVICE) as device:
        settings = {method: _digest(cfg, device) for method, cfg in cfgs.items()}
        kept = from_first_process(_read(path))
        if all(settings[method] == kept.get(method, {}).get("settings") for method in cfgs):
            return {method: Cost(**kept[method]["cost"]) for method in cfgs}
        trainers = prepare_trainers(list(cfgs.values()), device, image_sets)
        costs = _measure(dict(zip(cfgs, trainers, strict=True)), rounds, device)
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = {m: {"settings": settings[m], "cost": asdict(costs[m])} for m in costs}
        write_text(path, json.dumps(entries, indent=2))
    return costs


def _read(path: Path) -> dict[str, Any]:
    """What was kept; nothing where the file is missing or damaged, and is to be written anew."""
    try:
        kept = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _digest(cfg: CfgNode, device: torch.device) -> str:
    """A short name of what a step's cost depends on: all settings but the folders, the machine."""
    same = cfg.clone()
    same.defrost()
    same.OUTPUT_DIR = same.DATA.ROOT = ""
    about = describe_environment(cfg.SEED, device)
    machine = {key: about[key] for key in ("torch", "device", "threads", "processes")}
    return hashlib.sha256(f"{same.dump()}{machine}".encode()).hexdigest()[:16]


def _measure(trainers: Mapping[str, Trainer], rounds: int, device: torch.device) -> dict[str, Cost]:
    """Costs by method; every round has one batch, whose making counts for each method."""
    lead = next(iter(trainers.values()))
    batches = _endless(lead)
    steps = {method: Steps([trainer], ahead=1) for method, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {method: [] for method in trainers}
    for turn in range(rounds + WARM_UP_ROUNDS):
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        for method in trainers:
            taken = waited + _timed(partial(_step, steps[method], batch), device)
            if turn >= WARM_UP_ROUNDS:
                seconds[method].append(taken)
    costs = {}
    for method in trainers:
        unrecorded = Steps([trainers[method]], record=False)  # a replay asks for no memory
        growth = peak_growth(partial(_step, unrecorded, batch), device)
        milliseconds = 1000 * statistics.median(seconds[method]) / lead.cfg.SOLVER.BATCH_SIZE
        costs[method] = Cost(milliseconds, growth / 2**20)
    return costs


def _endless(trainer: Trainer) -> Iterator[Batch]:
    while True:
        yield from trainer.batches()


def _step(steps: Steps, batch: Batch) -> None:
    """The teacher's forward pass and the student's update."""
    for inputs in steps.inputs([(batch,)]):
        steps.run(inputs, 0)


def _timed(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
