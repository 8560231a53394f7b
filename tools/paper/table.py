"""A table of the paper as data, ``configs/reproduce/*.yaml``, and the runs that it needs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from pcka.engine.config import ConfigError, near_names

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "configs" / "reproduce"
SCRIPT = ROOT / "tools" / "reproduce.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
TEACHER = "teacher"  # stands for the method of a teacher's own run
TASKS = ("classification", "detection")
# Key of the file -> type of its value.
NEEDED: dict[str, type] = {
    "TITLE": str, "TASK": str, "COLUMNS": list, "SEEDS": list, "GPUS": int, "CONFIGS": str,
    "PAIRS": dict, "METHODS": dict,
}  # fmt: skip
OPTIONAL: dict[str, tuple[type, object]] = {
    "TOGETHER": (int, 8), "IMAGES": (int, 0), "CLASSES": (int, 0),
    "TEACHERS": (dict, {}), "NOT_HERE": (dict, {}),
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """What a table compares, and the paper's figures.

    Attributes:
        name: stem of its file's name.
        source: the name or path by which it was requested.
        keys: the content of the file.
        configs: the folder of the configuration files.
    """

    name: str
    source: str
    keys: Mapping[str, Any]
    configs: Path

    @property
    def pairs(self) -> list[str]:
        """The pairs of teacher and student, in order."""
        return list(self.keys["PAIRS"])

    @property
    def methods(self) -> list[str]:
        """The methods that can be trained, in order; the others are compared with the first."""
        return list(self.keys["METHODS"])

    def config_file(self, pair: str, method: str) -> Path:
        """The configuration of a pair; in detection each method has its own."""
        file = self.keys["PAIRS"][pair]
        return self.configs / (file[method] if isinstance(file, dict) else file)

    def published(self, pair: str, method: str) -> dict[str, float]:
        """Column -> the paper's figure, where it gives one."""
        row = {**self.keys["METHODS"], **self.keys["NOT_HERE"]}[method]
        figures = row[self.pairs.index(pair)]
        figures = figures if isinstance(figures, list) else [figures]
        found = zip(self.keys["COLUMNS"], figures)
        return {column: figure for column, figure in found if figure is not None}


def load_table(name: str) -> Table:
    """Return a table by its name, or from a YAML file.

    Raises:
        ConfigError: an unknown table, or an invalid file; the key is named.
    """
    path = Path(name) if name.endswith(".yaml") else TABLES / f"{name}.yaml"
    known = [path.stem for path in sorted(TABLES.glob("*.yaml"))]
    if not path.is_file():
        raise ConfigError(f"TABLE: no table {name!r}; {near_names(name, known)}, or a YAML file")
    try:
        keys = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(keys, dict):
        raise ConfigError(f"{path}: expected keys with values, as in {', '.join(known)}")
    keys = {**{key: default for key, (_, default) in OPTIONAL.items()}, **keys}
    _check(path, keys)
    return Table(path.stem, name, keys, (path.parent / keys["CONFIGS"]).resolve())


def _check(path: Path, keys: Mapping[str, Any]) -> None:
    kinds = {**NEEDED, **{key: kind for key, (kind, _) in OPTIONAL.items()}}
    if unknown := sorted(map(str, keys.keys() - kinds)):
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}; {near_names(unknown[0], kinds)}")
    for key, kind in kinds.items():
        if not isinstance(keys.get(key), kind):
            raise ConfigError(
                f"{path}: {key}: expected a value of type {kind.__name__}, got {keys.get(key)!r}"
            )
    for key in ("COLUMNS", "SEEDS", "PAIRS", "METHODS"):
        if not keys[key]:
            raise ConfigError(f"{path}: {key}: expected one entry or more, got none")
    if wrong := [seed for seed in keys["SEEDS"] if not isinstance(seed, int)]:
        raise ConfigError(f"{path}: SEEDS: expected whole numbers, got {wrong[0]!r}")
    for key in ("GPUS", "TOGETHER"):
        if keys[key] < 1:
            raise ConfigError(f"{path}: {key}: expected at least 1, got {keys[key]}")
    if keys["TASK"] not in TASKS:
        raise ConfigError(f"{path}: TASK: expected {' or '.join(TASKS)}, got {keys['TASK']!r}")
    _check_figures(path, keys)
    _check_files(path, keys)


def _check_figures(path: Path, keys: Mapping[str, Any]) -> None:
    for method, row in {**keys["METHODS"], **keys["NOT_HERE"]}.items():
        if not isinstance(row, list) or len(row) != len(keys["PAIRS"]):
            raise ConfigError(
                f"{path}: {method}: expected a figure (or null) for each of {len(keys['PAIRS'])} "
                f"pairs, got {row!r}"
            )
        figures = [one for cell in row for one in (cell if isinstance(cell, list) else [cell])]
        if wrong := [one for one in figures if not isinstance(one, int | float | None)]:
            raise ConfigError(f"{path}: {method}: expected figures or null, got {wrong[0]!r}")


def _check_files(path: Path, keys: Mapping[str, Any]) -> None:
    for pair, files in keys["PAIRS"].items():
        named = files if isinstance(files, dict) else dict.fromkeys(keys["METHODS"], files)
        if absent := [m for m in keys["METHODS"] if not isinstance(named.get(m), str)]:
            raise ConfigError(
                f"{path}: PAIRS: {pair}: expected a file, or one for each of METHODS; "
                f"{absent[0]} has {named.get(absent[0])!r}"
            )


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        pair: of teacher and student.
        method: a name of ``METHODS``.
        seed: of the student.
        config_file: of the pair, or of the run.
        folder: the folder that it writes to.
        overrides: ``KEY VALUE`` words, without seed and folder.
    """

    pair: str
    method: str
    seed: int
    config_file: Path
    folder: Path
    overrides: tuple[str, ...]

    @property
    def is_teacher(self) -> bool:
        """Whether it trains the teacher of its pair, and perhaps of others."""
        return self.method == TEACHER


@dataclass(frozen=True)
class State:
    """The state of a run.

    Attributes:
        text: description for people.
        result: the run's result, once it is finished.
        foreign: whether its folder holds a run with other settings.
    """

    text: str
    result: Mapping[str, Any] | None = None
    foreign: bool = False

    @property
    def done(self) -> bool:
        """Whether the run is finished."""
        return self.result is not None


MISSING = State("missing")


@dataclass(frozen=True)
class Job:
    """Runs that are trained by one command.

    Attributes:
        name: of the job.
        runs: of one pair.
        after: the name of the job that must finish first.
    """

    name: str
    runs: tuple[Run, ...]
    after: str = ""

    @property
    def trains_teacher(self) -> bool:
        """Whether it trains a teacher, which the students of its pairs wait for."""
        return self.runs[0].is_teacher


@dataclass(frozen=True)
class Plan:
    """Which runs of a table to make, and how.

    Attributes:
        table: the whole table.
        output: its runs are in ``output/<pair>/<method>/seed<seed>``.
        pairs: chosen.
        methods: chosen.
        seeds: chosen.
        gpus: number per job.
        together: number of students trained side by side.
        teachers: folder of the teachers' checkpoints; None: as in the table.
        overrides: ``KEY VALUE`` words for all runs.
    """

    table: Table
    output: Path
    pairs: Sequence[str]
    methods: Sequence[str]
    seeds: Sequence[int]
    gpus: int
    together: int
    teachers: Path | None = None
    overrides: Sequence[str] = ()

    def run(self, pair: str, method: str, seed: int, overrides: Sequence[str] = ()) -> Run:
        """A run of the table; ``overrides`` are those of its pair."""
        folder = self.output / pair / method / f"seed{seed}"
        file = self.table.config_file(pair, method)
        return Run(pair, method, seed, file, folder, (*self.overrides, *overrides))

    def command(self, job: Job, how: str) -> list[str]:
        """The command line that trains a job; ``how`` is the value of ``--launch``."""
        first = job.runs[0]
        words = [sys.executable, str(SCRIPT), self.table.source, "--launch", how]
        words += ["--pairs", first.pair, "--output", str(self.output.parent)]
        words += ["--gpus", str(self.gpus), "--together", str(self.together)]
        if job.trains_teacher:
            words += ["--teachers-only"]
        else:
            words += ["--methods", *(run.method for run in job.runs), "--seeds", str(first.seed)]
        if self.teachers is not None:
            words += ["--teachers", str(self.teachers)]
        return [*words, "--", *self.overrides] if self.overrides else words


@dataclass(frozen=True)
class Step:
    """A step of runs trained together, and the resulting cost of their whole training.

    Attributes:
        seconds: duration of one step, with all its students.
        steps: number of steps of the training.
        gpus: number of GPUs that share each step's batch.
        size: bytes that the runs leave on disk, logs excluded.
    """

    seconds: float
    steps: int
    gpus: int
    size: int

    @property
    def gpu_hours(self) -> float:
        """GPU hours of the training's steps alone."""
        return self.seconds * self.steps * self.gpus / 3600


class Task(Protocol):
    """Interface to a table's runs, of classifiers or of detectors."""

    @property
    def metrics(self) -> Mapping[str, str]:
        """Key of a result -> heading."""

    def runs(self) -> list[Run]:
        """All runs of the plan, those of teachers first."""

    def jobs(self) -> list[Job]:
        """Jobs for the missing runs; a job comes after the one that it waits for."""

    def state(self, run: Run) -> State:
        """The state of a run; one with other settings is not mistaken for it."""

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuse, before anything is trained, what a job would refuse.

        Raises:
            ConfigError: an invalid setting, or a missing checkpoint of a teacher.
        """

    def session(self, jobs: Sequence[Job], *, torchrun: bool) -> AbstractContextManager:
        """The context in which all calls of :meth:`train` run."""

    def train(self, job: Job, *, torchrun: bool) -> None:
        """Train or resume the runs of a job.

        Args:
            job: one of :meth:`jobs`.
            torchrun: start one process per GPU of the plan; otherwise train in this process or, if
                torchrun started several, in these.

        Raises:
            TrainingFailedError: a run failed; the others of the job are finished.
        """

    def steps(self, job: Job) -> list[Step]:
        """The steps of a job, one for each group of runs, measured on this device."""
