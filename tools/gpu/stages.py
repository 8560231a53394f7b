"""The checks on a GPU machine, in order, with their time limits.

A stage is a module run as ``python -m MODULE --output FOLDER --device cuda|cpu [--quick]`` with
further arguments. It writes its results so far as JSON into its folder whenever it has more: a
stage that is stopped at its limit keeps what it wrote. ``summary`` in that JSON is a list of lines
for the end of the run. A module with a non-zero exit code has failed.

To add one, write such a module and add a line to ``STAGES``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One module to run.

    Attributes:
        name: as given to ``--only`` and ``--skip``.
        module: run with ``python -m``.
        seconds: time limit.
        arguments: further arguments of the module.
        quick: further arguments of a rehearsal.
        alone: whether nothing else may run beside it, because it measures time. Neighbours that are
            not alone run at the same time.
        files: files in its folder that are kept with the results.
        needed: whether the run exits with 3 if this stage fails.
    """

    name: str
    module: str
    seconds: int
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    alone: bool = True
    files: tuple[str, ...] = ()
    needed: bool = False


# A rehearsal uses one thread: on a busy machine, several wait for each other.
_ONE_THREAD = ("--threads", "1")

STAGES = (
    Stage("environment", "tools.gpu.environment", 20, needed=True),
    Stage("ceilings", "benchmarks.ceilings", 15, quick=_ONE_THREAD),
    Stage("tests", "tools.gpu.tests", 100, alone=False, files=("tests.xml",)),
    Stage("sanitizer", "tools.gpu.sanitizer", 100, alone=False, files=("sanitizer.txt",)),
    Stage("accuracy", "benchmarks.accuracy", 60, ("--seeds", "2"), _ONE_THREAD, alone=False),
    Stage("compiled", "benchmarks.compiled", 100, quick=_ONE_THREAD, alone=False),
    Stage(
        "operators",
        "benchmarks.operators_gpu",
        95,
        ("--seconds", "60"),
        quick=(*_ONE_THREAD, "--seconds", "600", "--cases", "p3_rows*", "p6*", "p5_columns*"),
    ),
    Stage("ncu", "tools.gpu.ncu", 25, files=("ncu.csv",)),
    Stage("throughput", "benchmarks.classification_throughput", 150, ("--seconds", "3")),
    Stage(
        "detector",
        "benchmarks.detection_step",
        45,
        ("--batch", "2", "16", "--autocast", "bfloat16", "--methods", "PCKA",
         "--short-side", "800", "--long-side", "1333"),
        quick=_ONE_THREAD,
    ),
)  # fmt: skip


def choose(only: Sequence[str], skip: Sequence[str]) -> list[Stage]:
    """The requested stages; needed ones are always included.

    Raises:
        ValueError: an unknown stage name.
    """
    names = [stage.name for stage in STAGES]
    for name in (*only, *skip):
        if name not in names:
            raise ValueError(f"unknown stage {name!r}; available: {', '.join(names)}")
    wanted = [name for name in names if name in (only or names) and name not in skip]
    return [stage for stage in STAGES if stage.needed or stage.name in wanted]


def together(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Groups of stages, run one after the other; within a group, at the same time."""
    groups: list[list[Stage]] = []
    for stage in stages:
        if groups and not stage.alone and not groups[-1][-1].alone:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups
