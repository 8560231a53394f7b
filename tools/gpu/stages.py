"""What is checked on a GPU machine, in this order, and how long each may take.

A stage is a module that is run as ``python -m MODULE --output FOLDER --device cuda|cpu [--quick]``
and further arguments. It writes JSON into its folder, whatever it has each time that it has more:
a stage that is stopped at its limit keeps what it wrote. ``summary`` in that JSON is a list of
lines for the end of the run. A module that ends with another code than 0 has failed.

To add one, write such a module and give it a line in ``STAGES``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One module to run.

    Attributes:
        name: what ``--only`` and ``--skip`` call it.
        module: run with ``python -m``.
        seconds: it is stopped after so long.
        arguments: further ones of the module.
        quick: and further ones of a rehearsal.
        alone: nothing else may run beside it, because it measures time. Neighbours that are not
            alone run at the same time.
        files: of its folder, that are kept beside the results.
        needed: whether the run ends with 3 where this stage fails.
    """

    name: str
    module: str
    seconds: int
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    alone: bool = True
    files: tuple[str, ...] = ()
    needed: bool = False


# A rehearsal has one thread: on a busy machine several wait for each other.
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
    """The stages asked for; those that the others need are always among them.

    Raises:
        ValueError: a name that no stage has.
    """
    names = [stage.name for stage in STAGES]
    for name in (*only, *skip):
        if name not in names:
            raise ValueError(f"no stage is called {name!r}; there are {', '.join(names)}")
    wanted = [name for name in names if name in (only or names) and name not in skip]
    return [stage for stage in STAGES if stage.needed or stage.name in wanted]


def together(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Groups that run one after the other; within a group at the same time."""
    groups: list[list[Stage]] = []
    for stage in stages:
        if groups and not stage.alone and not groups[-1][-1].alone:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups
