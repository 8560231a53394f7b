"""What a training step of each method costs: time an image, and memory at its peak."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from classification.experiment import ImageSets, prepare_trainers
from classification.launch import process_group
from classification.loop import prepare_inputs, teacher_observer
from classification.run_files import write_text
from classification.trainer import Trainer
from pcka.analysis.memory import peak_growth
from pcka.distributed import rank

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
    settings = {method: _digest(cfg) for method, cfg in cfgs.items()}
    kept = json.loads(path.read_text()) if path.exists() else {}
    if all(settings[method] == kept.get(method, {}).get("settings") for method in cfgs):
        return {method: Cost(**kept[method]["cost"]) for method in cfgs}
    lead = next(iter(cfgs.values()))
    with process_group(lead.DEVICE) as device:
        trainers = prepare_trainers(list(cfgs.values()), device, image_sets)
        steps = {method: _step(trainer) for method, trainer in zip(cfgs, trainers, strict=True)}
        seconds: dict[str, list[float]] = {method: [] for method in steps}
        for turn in range(rounds + WARM_UP_ROUNDS):
            for method, step in steps.items():
                taken = _timed(step, device)
                if turn >= WARM_UP_ROUNDS:
                    seconds[method].append(taken)
        costs = {
            method: Cost(
                milliseconds=1000 * statistics.median(seconds[method]) / lead.SOLVER.BATCH_SIZE,
                mebibytes=peak_growth(step, device) / 2**20,
            )
            for method, step in steps.items()
        }
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = {m: {"settings": settings[m], "cost": asdict(costs[m])} for m in costs}
        write_text(path, json.dumps(entries, indent=2))
    return costs


def _digest(cfg: CfgNode) -> str:
    """A short name of all settings, the folders where runs and data lie aside."""
    same = cfg.clone()
    same.defrost()
    same.OUTPUT_DIR = same.DATA.ROOT = ""
    return hashlib.sha256(same.dump().encode()).hexdigest()[:16]


def _step(trainer: Trainer) -> Callable[[], None]:
    """Return a call that trains on the next batch, all of it included."""
    batches = iter(())
    observe = teacher_observer([trainer])

    def step() -> None:
        nonlocal batches
        batch = next(batches, None)
        if batch is None:
            batches = iter(trainer.batches())
            batch = next(batches)
        trainer.step(prepare_inputs([trainer], batch, observe), 0)

    return step


def _timed(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
