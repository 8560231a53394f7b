"""Report sections shared by classifiers and detectors: comparisons, and how a run was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fvcore.common.config import CfgNode

from pcka.engine.comparison import Comparison
from pcka.engine.config import flatten
from pcka.engine.curves import Points
from pcka.engine.report import Card, Picture, Section, Table

VERSIONS = ("date", "python", "torch", "torchvision", "pcka", "device", "threads", "processes")


def run_section(cfg: CfgNode, silent: CfgNode, environment: Mapping[str, Any]) -> Section:
    """The configuration and the environment of a run.

    Args:
        cfg: of the run.
        silent: the default configuration.
        environment: see :func:`pcka.engine.environment.describe_environment`.
    """
    defaults = flatten(silent)
    changed = {k: v for k, v in flatten(cfg).items() if k not in defaults or defaults[k] != v}
    git = environment.get("git") or {}
    versions = {key: environment.get(key) for key in VERSIONS} | {
        "commit": git.get("commit", "") + (" with changes" if git.get("dirty") else ""),
        "command": " ".join(environment.get("command_line", ())),
    }
    return Section(
        "Run",
        tables=[
            Table(["made with", ""], _rows({k: v for k, v in versions.items() if v}), prose=True)
        ],
        folded={
            "Settings that differ from the defaults": Table(
                ["key", "value"], _rows(changed), prose=True
            ),
            "Whole configuration": cfg.dump(),
        },
    )


def _rows(pairs: Mapping[str, object]) -> list[list[str]]:
    return [[key, str(value)] for key, value in pairs.items()]


def table_section(comparison: Comparison) -> Section:
    """The table of a comparison, every run as a point, and the failed runs."""
    headings, rows = comparison.cells()
    failures = [
        f"{method}, seed {seed}: {text}"
        for method, by_seed in comparison.failures.items()
        for seed, text in by_seed.items()
    ]
    how = (
        "Not shown: with these seeds the difference from the first row cannot be told from chance; "
        "more seeds may show it."
    )
    return Section(
        "Comparison",
        tables=[Table(headings, rows, how)],
        pictures=[Picture("Every run", comparison.figure())],
        folded={"Failed runs": "\n".join(failures)} if failures else {},
    )


def method_cards(comparison: Comparison) -> Iterator[Card]:
    """Each method's mean, and what the seeds show about it."""
    heading = next(iter(comparison.metrics.values()))
    for row in comparison.rows():
        compared = " ".join(filter(None, (row[comparison.difference], row["difference"])))
        yield Card(row[comparison.subject], row[heading], compared or heading)


def mean_curve(curves: Sequence[Points]) -> list[tuple[float, float]]:
    """The mean of curves, at the steps common to all of them."""
    by_step = [dict(points) for points in curves]
    common = sorted(set.intersection(*map(set, by_step)))
    return [(step, sum(points[step] for points in by_step) / len(by_step)) for step in common]
