"""Reproduce the paper's tables: ``python tools/reproduce.py TABLE [--launch HOW] [-- KEY VALUE]``.

Lists, launches, estimates and collects the runs of ``configs/reproduce/TABLE.yaml``. Finished runs
are skipped, and interrupted ones resumed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from pcka.engine.arguments import command_parser
from pcka.engine.command import TrainingFailedError, run_command
from pcka.engine.config import ConfigError, near_names
from pcka.engine.progress import console_log
from pcka.engine.run_folder import write_text
from tools.paper import collect, estimate, slurm
from tools.paper.table import Job, Plan, Task, load_table


def main(arguments: Sequence[str] | None = None) -> None:
    """Process a table as the arguments specify.

    Raises:
        ConfigError: a name that is not in the table, or an unusable setting.
        TrainingFailedError: a run failed; the others are finished.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Flags that take lists would swallow KEY VALUE pairs: these come after "--".
    end = words.index("--") if "--" in words else len(words)
    given = _parser().parse_args(words[:end])
    plan = _plan(given, words[end + 1 :])
    task = _task(plan)
    if given.launch:
        jobs = [job for job in task.jobs() if job.trains_teacher or not given.teachers_only]
        _launch(plan, task, jobs, given)
    elif given.estimate:
        print(estimate.table(plan, task))
    elif given.collect:
        _collect(plan, task)
    else:
        print(_listed(plan, task))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "Runs the paper's tables. KEY VALUE pairs for all runs come last, after --.",
        "python tools/reproduce.py table1 --launch local -- DATA.ROOT path/to/cifar",
    )
    parser.add_argument("table", metavar="TABLE", help="table1, table2, table3 or a YAML file")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="the state of every run (default)")
    action.add_argument(
        "--estimate", action="store_true", help="GPU hours and disk, from a few steps"
    )
    action.add_argument(
        "--launch", choices=["local", "torchrun", "slurm"], help="train missing runs"
    )
    action.add_argument("--collect", action="store_true", help="the table; also in --output")
    parser.add_argument("--pairs", nargs="+", metavar="P", help="only these pairs")
    parser.add_argument("--methods", nargs="+", metavar="M", help="only these methods")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="S")
    parser.add_argument("--output", type=Path, default=Path("output/reproduce"), metavar="DIR")
    parser.add_argument("--gpus", type=_positive, metavar="N", help="per job")
    parser.add_argument("--together", type=_positive, metavar="N", help="students side by side")
    parser.add_argument("--teachers", type=Path, metavar="DIR", help="folder of their checkpoints")
    parser.add_argument("--teachers-only", action="store_true", help="train no students")
    parser.add_argument(
        "--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="submitit: partition=gpu ..."
    )
    return parser


def _plan(given: argparse.Namespace, overrides: Sequence[str]) -> Plan:
    table = load_table(given.table)
    if given.teachers and table.keys["TASK"] == "detection":
        raise ConfigError(
            "--teachers: is for classifiers; a detector's teacher is its DISTILL.TEACHER.WEIGHTS"
        )
    return Plan(
        table,
        given.output / table.name,
        _chosen("--pairs", given.pairs, table.pairs),
        _chosen("--methods", given.methods, table.methods),
        _chosen("--seeds", given.seeds, given.seeds or table.keys["SEEDS"]),
        given.gpus or table.keys["GPUS"],
        given.together or table.keys["TOGETHER"],
        given.teachers,
        overrides,
    )


def _chosen(flag: str, wanted: list | None, known: list) -> list:
    for name in wanted or []:
        if name not in known:
            raise ConfigError(f"{flag}: the table has no {name!r}; {near_names(str(name), known)}")
    if len(set(wanted or known)) != len(wanted or known):
        raise ConfigError(f"{flag}: expected each one once, got {wanted or known}")
    return wanted or known


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _task(plan: Plan) -> Task:
    # Imported here: only detectors need detectron2.
    if plan.table.keys["TASK"] == "detection":
        from tools.paper.detectors import Detectors

        return Detectors(plan)
    from tools.paper.classifiers import Classifiers

    return Classifiers(plan)


def _listed(plan: Plan, task: Task) -> str:
    """One line per pair and method, with the state of each seed."""
    by_line: dict[tuple[str, str], dict[int, str]] = {}
    for run in task.runs():
        name = run.folder.name if run.is_teacher else run.pair
        by_line.setdefault((name, run.method), {})[run.seed] = task.state(run).text
    texts = [text for by_seed in by_line.values() for text in by_seed.values()]
    seeds = sorted({seed for by_seed in by_line.values() for seed in by_seed})
    rows = [[*line, *(by_seed.get(s, "") for s in seeds)] for line, by_seed in by_line.items()]
    heads = ["pair", "method", *(f"seed {seed}" for seed in seeds)]
    counted = f"{texts.count('done')} of {len(texts)} runs are done, in {plan.output}"
    return f"{tabulate(rows, heads)}\n\n{counted}"


def _launch(plan: Plan, task: Task, jobs: Sequence[Job], given: argparse.Namespace) -> None:
    for run in (run for job in jobs for run in job.runs):
        if (state := task.state(run)).foreign:
            raise ConfigError(
                f"{run.folder}: holds a run with {state.text}; use its settings, or another "
                "--output"
            )
    task.check(jobs)
    if given.launch == "slurm":
        for name, job in slurm.submit(plan, jobs, slurm.options(given.slurm)).items():
            print(f"submitted {name} as {job.job_id}")
        return
    with console_log():
        failures = _train(task, jobs, torchrun=given.launch == "torchrun")
    if "RANK" not in os.environ:  # otherwise torchrun's caller prints it
        print(_listed(plan, task))
    if failures:
        raise TrainingFailedError("; ".join(failures.values()))


def _train(task: Task, jobs: Sequence[Job], *, torchrun: bool) -> dict[str, str]:
    """Train the jobs one after the other; return job name -> reason for those that failed."""
    failures: dict[str, str] = {}
    with task.session(jobs, torchrun=torchrun):
        for job in jobs:
            if job.after in failures:
                failures[job.name] = f"{job.name}: needs {job.after}"
                continue
            try:
                task.train(job, torchrun=torchrun)
            except TrainingFailedError as error:
                failures[job.name] = str(error)
    return failures


def _collect(plan: Plan, task: Task) -> None:
    """Print the table; write it and the list of its runs."""
    states = {run: task.state(run) for run in task.runs()}
    text = collect.markdown(plan, task.metrics, states)
    plan.output.mkdir(parents=True, exist_ok=True)
    write_text(plan.output / f"{plan.table.name}.md", text)
    write_text(plan.output / f"{plan.table.name}.csv", collect.lines(plan, task.metrics, states))
    print(text)


if __name__ == "__main__":
    run_command(main, interrupted="repeat the command to continue where it stopped")
