"""Tables of classifiers: the students of a pair and seed are trained side by side."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from classification.compare import METRICS
from classification.config import changed_keys, load_config
from classification.run import run_experiment
from classification.sweep import run_side_by_side
from classification.teacher import check_teacher
from pcka import losses
from pcka.engine.command import TrainingFailedError
from pcka.engine.comparison import pairs_of_run
from pcka.engine.config import ConfigError
from pcka.engine.launch import process_group
from pcka.engine.run_folder import read_metrics
from tools.paper.steps import classifiers_step
from tools.paper.table import MISSING, TEACHER, TORCHRUN, Job, Plan, Run, State, Step

WEIGHTS = Path("weights")  # holds teachers that are not trained here


class Classifiers:
    """The runs of a table of classifiers; the teachers' runs come first.

    Args:
        plan: what to run.
    """

    metrics: Mapping[str, str] = METRICS

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._teachers = {pair: self._teacher(pair) for pair in plan.pairs}

    def _teacher(self, pair: str) -> tuple[Run | None, tuple[str, ...]]:
        """The teacher's own run, if it is trained here, and the overrides of its students."""
        plan, known = self.plan, self.plan.table.keys["TEACHERS"]
        first = plan.table.methods[0]
        keys = load_config(plan.table.config_file(pair, first), plan.overrides, first).TEACHER
        if not keys.NAME or keys.WEIGHTS or keys.TRAIN:
            return None, ()
        if plan.teachers is None and "TRAINED_BY" in known:
            folder = plan.output / "teachers" / keys.NAME.replace("/", "_")
            own = ("STUDENT.NAME", keys.NAME, "TEACHER.NAME", "")
            file = plan.table.configs / known["TRAINED_BY"]
            run = Run(pair, TEACHER, 0, file, folder, (*plan.overrides, *own))
            return run, ("TEACHER.WEIGHTS", str(folder / "model_last.pth"))
        if keys.NAME not in known.get("FILES", {}):
            raise ConfigError(
                f"{pair}: TEACHER.WEIGHTS: {plan.table.name} has no checkpoint of {keys.NAME!r}; "
                "give it as KEY VALUE after --"
            )
        folder = plan.teachers or WEIGHTS
        return None, ("TEACHER.WEIGHTS", str(folder / known["FILES"][keys.NAME]))

    def runs(self) -> list[Run]:
        """All runs of the plan."""
        students = (runs for pair in self.plan.pairs for runs in self._students(pair).values())
        return [*self._trained_teachers(), *chain.from_iterable(students)]

    def _trained_teachers(self) -> list[Run]:
        """One run per teacher, however many pairs it has."""
        runs = [run for run, _ in self._teachers.values() if run is not None]
        return list({run.folder: run for run in reversed(runs)}.values())[::-1]

    def _students(self, pair: str) -> dict[int, list[Run]]:
        """Seed -> the runs of a pair."""
        plan, (_, overrides) = self.plan, self._teachers[pair]
        return {
            seed: [plan.run(pair, method, seed, overrides) for method in plan.methods]
            for seed in plan.seeds
        }

    def jobs(self) -> list[Job]:
        """Jobs for the missing runs: one per teacher, then one per pair and seed."""
        teachers = {
            run.folder: Job(f"teacher-{run.folder.name}", (run,))
            for run in self._trained_teachers()
            if not self.state(run).done
        }
        jobs = list(teachers.values())
        for pair in self.plan.pairs:
            own, _ = self._teachers[pair]
            after = teachers[own.folder].name if own and own.folder in teachers else ""
            for seed, runs in self._students(pair).items():
                if missing := [run for run in runs if not self.state(run).done]:
                    jobs.append(Job(f"{pair}-seed{seed}", tuple(missing), after))
        return jobs

    def configure(self, run: Run) -> CfgNode:
        """The configuration of a run."""
        method = "ce" if run.method == TEACHER else run.method
        pairs = pairs_of_run(run.overrides, run.seed, run.folder)
        return load_config(run.config_file, pairs, method)

    def state(self, run: Run) -> State:
        """The state of a run; one with other settings is not mistaken for it."""
        config = run.folder / "config.yaml"
        if not config.is_file():
            return MISSING
        cfg = self.configure(run)
        if changed := changed_keys(load_config(config), cfg):
            return State(f"other {', '.join(changed)}", foreign=True)
        result = _result(run.folder / "result.json")
        if result.get("epochs") == cfg.SOLVER.EPOCHS:
            return State("done", result)
        records = read_metrics(run.folder / "metrics.jsonl")
        return State(f"epoch {records[-1]['epoch'] if records else 0} of {cfg.SOLVER.EPOCHS}")

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuse, before anything is trained, what a job would refuse.

        Raises:
            ConfigError: an invalid setting, or a missing checkpoint of a teacher.
        """
        own = {str(run.folder / "model_last.pth") for run in self._trained_teachers()}
        for job in jobs:
            for cfg in map(self.configure, job.runs):
                if cfg.TEACHER.WEIGHTS not in own:
                    check_teacher(cfg)

    def session(self, jobs: Sequence[Job], *, torchrun: bool) -> AbstractContextManager:
        """The context in which all calls of :meth:`train` run."""
        alone = torchrun or not jobs
        return nullcontext() if alone else process_group(self.configure(jobs[0].runs[0]).DEVICE)

    def train(self, job: Job, *, torchrun: bool) -> None:
        """See :meth:`tools.paper.table.Task.train`."""
        if torchrun:
            command = self.plan.command(job, "local")
            _run([*TORCHRUN, str(self.plan.gpus), *command[1:]], job)
            return
        if job.trains_teacher:
            run_experiment(self.configure(job.runs[0]), resume=True)
            return
        failed = []
        for group in self._groups(job):
            results = run_side_by_side([self.configure(run) for run in group], resume=True)
            for run, result in zip(group, results, strict=True):
                if isinstance(result, TrainingFailedError):
                    failed.append(f"{run.folder}: {result}")
        if failed:
            raise TrainingFailedError("; ".join(failed))

    def _groups(self, job: Job) -> Iterator[list[Run]]:
        """Groups of runs that are trained side by side.

        A loss that cannot be part of a CUDA graph keeps all runs beside it out of one, which costs
        them most of their speed: such runs are grouped apart from the others.
        """
        together = self.plan.together
        fit: dict[bool, list[Run]] = {True: [], False: []}
        for run in job.runs:
            methods = self.configure(run).DISTILL.METHODS
            fit[all(losses.build(name).capturable for name in methods)].append(run)
        for runs in fit.values():
            yield from (runs[i : i + together] for i in range(0, len(runs), together))

    def steps(self, job: Job) -> list[Step]:
        """The cost of a job's steps, measured on this device.

        Raises:
            ConfigError: the table does not give the numbers of images and classes.
        """
        keys, gpus = self.plan.table.keys, self.plan.gpus
        if not keys["IMAGES"] or not keys["CLASSES"]:
            raise ConfigError(f"{self.plan.table.name}: IMAGES, CLASSES: --estimate needs them")
        groups = [list(job.runs)] if job.trains_teacher else self._groups(job)
        count = keys["IMAGES"], keys["CLASSES"]
        cfgs = ([self.configure(run) for run in group] for group in groups)
        return [classifiers_step(group, *count, gpus) for group in cfgs]


def _result(path: Path) -> dict[str, Any]:
    """The result of a run; empty if missing or damaged, and then rewritten."""
    try:
        result = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def _run(command: Sequence[str], job: Job) -> None:
    """Run a command, which itself reports why it fails."""
    ended = subprocess.run(command, check=False)
    if ended.returncode == 130:
        raise KeyboardInterrupt
    if ended.returncode:
        raise TrainingFailedError(f"{job.name}: its processes failed; see their output")
