"""Jobs in SLURM's queue, by submitit (the extra ``slurm``)."""

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
REQUEUES = 100  # after the time limit, where the runs go on; a table takes more than submitit's 3
SHARED = ("timeout_min", "mem_gb", "cpus_per_task")  # what submitit calls alike everywhere


@dataclass(frozen=True)
class Command:
    """A command as a job, which submitit puts into the queue again when its time is up."""

    words: tuple[str, ...]

    def __call__(self) -> None:
        """Run it; raises ``CalledProcessError`` where it fails."""
        subprocess.run(self.words, check=True, preexec_fn=_leave_signal)

    def checkpoint(self) -> Any:
        """What submitit submits again: the same, since the runs go on by themselves."""
        return optional_package("submitit.helpers", "slurm").DelayedSubmission(self)


def _leave_signal() -> None:
    """SLURM tells all processes that the time is up; it would end those that do not handle it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def options(words: Sequence[str]) -> dict[str, Any]:
    """The ``KEY=VALUE`` words of ``--slurm``, with values as YAML has them.

    Raises:
        ConfigError: a word without ``=``.
    """
    for word in words:
        if "=" not in word:
            raise ConfigError(f"--slurm: expected KEY=VALUE, as partition=gpu, got {word!r}")
    pairs = (word.partition("=") for word in words)
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def submit(
    plan: Plan, jobs: Sequence[Job], given: Mapping[str, Any], *, cluster: str = "slurm"
) -> dict[str, Any]:
    """Submit jobs; one that waits for another starts once that has ended well.

    Args:
        plan: of the jobs; submitit's files go to ``output/slurm``.
        jobs: those that others wait for come first.
        given: parameters of submitit, such as ``partition`` or ``timeout_min``.
        cluster: of submitit; ``local`` and ``debug`` need no SLURM.

    Returns:
        Name -> submitit's job.

    Raises:
        ConfigError: there is no SLURM here, or it has no such parameter.
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
