"""Cost of the missing runs of a table: GPU hours and disk, from measured steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tabulate import tabulate

from tools.paper.table import Job, Plan, Step, Task

GIB = 2**30


def table(plan: Plan, task: Task) -> str:
    """Measure a step of every pair's missing runs; return the resulting estimate as text."""
    measured: dict[tuple, list[Step]] = {}
    costs: dict[str, list[tuple[Job, list[Step]]]] = {}
    for job in task.jobs():
        # All seeds cost the same.
        alike = (job.runs[0].pair, *(run.method for run in job.runs))
        if alike not in measured:
            measured[alike] = task.steps(job)
        name = job.name if job.trains_teacher else job.runs[0].pair
        costs.setdefault(name, []).append((job, measured[alike]))
    rows = [[name, *_figures(jobs)] for name, jobs in costs.items()]
    rows.append(["all", *_figures([job for jobs in costs.values() for job in jobs])])
    return f"{_rendered(rows)}\n\n{_how(plan)}"


def _figures(jobs: Sequence[tuple[Job, Sequence[Step]]]) -> list[float]:
    """Number of runs, GPU hours, disk in GiB."""
    steps = [step for _, steps in jobs for step in steps]
    runs = sum(len(job.runs) for job, _ in jobs)
    hours, size = sum(step.gpu_hours for step in steps), sum(step.size for step in steps)
    return [runs, hours, size / GIB]


def _rendered(rows: Sequence[Sequence[object]]) -> str:
    heads = ["pair", "missing runs", "GPU hours", "disk (GiB)"]
    return tabulate(rows, heads, tablefmt="github", floatfmt=("", "", ".2f", ".2f"))


def _how(plan: Plan) -> str:
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    hours = "GPU hours" if cuda else "GPU hours are hours of this machine"
    return (
        f"Estimate: a few steps on {device}, on random images and with random weights, times "
        f"the number of steps and of GPUs ({plan.gpus} a job). {hours}; evaluation, reading "
        "images and communication between GPUs are extra. Disk: the checkpoints, without logs."
    )
