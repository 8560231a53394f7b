"""Submits jobs to SLURM through submitit (the extra ``slurm``)."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pcka.engine.config import ConfigError
from pcka.extras import optional_package
from tools.paper.table import Job, Plan

DAY = 24 * 60  # minutes
REQUEUES = 100  # after the time limit, when runs resume; a table takes more than submitit's 3
SHARED = ("timeout_min", "mem_gb", "cpus_per_task")  # named alike by submitit for every cluster


@dataclass(frozen=True)
class Command:
    """A command as a job, which submitit requeues when its time is up."""

    words: tuple[str, ...]

    def __call__(self) -> None:
        """Run the command; raises ``CalledProcessError`` if it fails."""
        subprocess.run(self.words, check=True, preexec_fn=_leave_signal)

    def checkpoint(self) -> Any:
        """What submitit resubmits: the same command, since runs resume by themselves."""
        return optional_package("submitit.helpers", "slurm").DelayedSubmission(self)


def _leave_signal() -> None:
    """Ignore the time limit's signal, which SLURM sends to all processes; it would end them."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def options(words: Sequence[str]) -> dict[str, Any]:
    """The ``KEY=VALUE`` words of ``--slurm``, with values parsed as YAML.

    Raises:
        ConfigError: a word without ``=``, or a value that is not YAML.
    """
    for word in words:
        if "=" not in word:
            raise ConfigError(f"--slurm: expected KEY=VALUE, e.g. partition=gpu, got {word!r}")
    pairs = (word.partition("=") for word in words)
    try:
        return {key: yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError as error:
        raise ConfigError(f"--slurm: a value is not YAML: {error}") from error


def submit(
    plan: Plan, jobs: Sequence[Job], given: Mapping[str, Any], *, cluster: str = "slurm"
) -> dict[str, Any]:
    """Submit jobs; one that waits for another starts once that has succeeded.

    Args:
        plan: the jobs' plan; submitit's files go to ``output/slurm``.
        jobs: those that others wait for come first.
        given: submitit's parameters, such as ``partition`` or ``timeout_min``.
        cluster: submitit's cluster; ``local`` and ``debug`` need no SLURM.

    Returns:
        Job name -> submitit's job.

    Raises:
        ConfigError: there is no SLURM here, or no such parameter.
        ImportError: submitit is not installed; the message says how to get it.
    """
    submitit = optional_package("submitit", "slurm")
    inner = "torchrun" if plan.gpus > 1 else "local"
    submitted: dict[str, Any] = {}
    for job in jobs:
        parameters = {
            "name": f"{plan.table.name}-{job.name}",
            "nodes": 1,
            "tasks_per_node": 1,
            "gpus_per_node": plan.gpus,
            "timeout_min": DAY,
            **{key if key in SHARED else f"slurm_{key}": value for key, value in given.items()},
        }
        if job.after in submitted:
            parameters["slurm_dependency"] = f"afterok:{submitted[job.after].job_id}"
            more = parameters.get("slurm_additional_parameters", {})
            parameters["slurm_additional_parameters"] = {**more, "kill-on-invalid-dep": "yes"}
        folder = plan.output / "slurm"
        try:
            executor = submitit.AutoExecutor(
                folder, cluster=cluster, slurm_max_num_timeout=REQUEUES
            )
            executor.update_parameters(**parameters)
        except (RuntimeError, NameError, AssertionError, TypeError) as error:
            raise ConfigError(f"--slurm: {error}") from error
        submitted[job.name] = executor.submit(Command(tuple(plan.command(job, inner))))
    return submitted
