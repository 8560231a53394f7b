"""Tables of detectors: each run is a job of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage

import detection.meta_arch  # noqa: F401  (registers itself)
from benchmarks.detection_step import random_batch
from detection.compare import finished, other_settings, train
from detection.config import DISTILLED, MODEL_ZOO, load_config
from detection.data.register import class_count
from detection.preflight import usable_device
from detection.settings import CHECKPOINT_TAG, CONFIG
from detection.trainer import student_of, train_in_bfloat16
from pcka.engine.config import ConfigError
from tools.paper.steps import COUNTS, moment, saved_size
from tools.paper.table import MISSING, TORCHRUN, Job, Plan, Run, State, Step

RANDOM_WEIGHTS = [
    "MODEL.WEIGHTS", "", "DISTILL.TEACHER.WEIGHTS", "", "DISTILL.TEACHER.RANDOM_WEIGHTS", "True",
]  # fmt: skip
ASPECT = 4 / 3  # of most COCO images


class Detectors:
    """The runs of a table of detectors.

    Args:
        plan: what to run.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.metrics: Mapping[str, str] = {name: name for name in plan.table.keys["COLUMNS"]}

    def runs(self) -> list[Run]:
        """All runs of the plan."""
        plan = self.plan
        return [
            plan.run(pair, method, seed)
            for pair in plan.pairs
            for method in plan.methods
            for seed in plan.seeds
        ]

    def jobs(self) -> list[Job]:
        """Jobs for the missing runs, one per run."""
        return [
            Job(f"{run.pair}-{run.method}-seed{run.seed}", (run,))
            for run in self.runs()
            if not self.state(run).done
        ]

    def state(self, run: Run) -> State:
        """The state of a run; one with other settings is not mistaken for it."""
        if not (run.folder / CONFIG).is_file():
            return MISSING
        if changed := other_settings(run.config_file, run.seed, run.folder, run.overrides):
            return State(f"other {', '.join(changed)}", foreign=True)
        metrics = finished(run.config_file, run.seed, run.folder, run.overrides)
        if metrics is not None:
            return State("done", metrics["bbox"])
        steps = load_config(str(run.config_file), list(run.overrides)).SOLVER.MAX_ITER
        return State(f"step {_saved_steps(run.folder / CHECKPOINT_TAG, steps)} of {steps}")

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuse, before anything is trained, what a job would refuse.

        Raises:
            ConfigError: an invalid setting, or a missing checkpoint of a teacher.
        """
        for job in jobs:
            (run,) = job.runs
            cfg = load_config(str(run.config_file), list(run.overrides))
            weights = cfg.DISTILL.TEACHER.WEIGHTS
            named = cfg.MODEL.META_ARCHITECTURE == DISTILLED and weights not in ("", MODEL_ZOO)
            if named and "://" not in weights and not Path(weights).is_file():
                raise ConfigError(
                    f"{job.name}: DISTILL.TEACHER.WEIGHTS: no file {weights!r}; see "
                    "docs/detection.md for its source"
                )

    def session(self, jobs: Sequence[Job], *, torchrun: bool) -> AbstractContextManager:
        """The context of all calls of :meth:`train`: empty, as each starts processes."""
        return nullcontext()

    def train(self, job: Job, *, torchrun: bool) -> None:
        """Train or resume the run of a job, in one process or in as many as the plan has GPUs.

        Raises:
            TrainingFailedError: the run failed.
        """
        launcher = [*TORCHRUN, str(self.plan.gpus)] if torchrun else [sys.executable]
        (run,) = job.runs
        train(run.config_file, run.seed, run.folder, run.overrides, launcher=launcher)

    def steps(self, job: Job) -> list[Step]:
        """The cost of a job's steps, measured on this device with random weights."""
        (run,) = job.runs
        cfg = load_config(str(run.config_file), [*run.overrides, *RANDOM_WEIGHTS])
        cfg.MODEL.DEVICE = usable_device(cfg.MODEL.DEVICE)
        model = build_model(cfg).train()
        if cfg.SOLVER.AMP.ENABLED:
            train_in_bfloat16(model)
        optimizer = build_optimizer(cfg, model)
        sides = sorted(cfg.INPUT.MIN_SIZE_TRAIN)
        short = sides[len(sides) // 2]
        size = short, min(round(ASPECT * short), cfg.INPUT.MAX_SIZE_TRAIN)
        images = max(1, cfg.SOLVER.IMS_PER_BATCH // self.plan.gpus)
        batch = random_batch(images, *size, classes=class_count(cfg))
        device = torch.device(cfg.MODEL.DEVICE)
        untimed, timed = COUNTS[device.type]
        start = 0.0
        with EventStorage():
            for number in range(untimed + timed):
                if number == untimed:
                    start = moment(device)
                optimizer.zero_grad()
                sum(term.sum() for term in model(batch).values()).backward()
                optimizer.step()
        seconds = (moment(device) - start) / timed
        saved = saved_size([student_of(model).state_dict(), optimizer.state_dict()])
        steps, period = cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD
        return [Step(seconds, steps, self.plan.gpus, saved * (steps // period + 1))]


def _saved_steps(tag: Path, steps: int) -> int:
    """The steps of a run's last checkpoint; that of all steps, ``model_final.pth``, has no number.

    Args:
        tag: file that names the checkpoint; missing before the first one.
        steps: steps of the run.
    """
    if not tag.is_file():
        return 0
    numbered = re.search(r"(\d+)\.pth", tag.read_text())
    return int(numbered[1]) + 1 if numbered else steps
