"""Comparison of methods over seeds, for both tasks: tables, CSV file and plot."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

from pcka.distributed import rank
from pcka.engine.command import TrainingFailedError
from pcka.engine.config import ConfigError, pairs_of
from pcka.engine.curves import method_style
from pcka.engine.run_folder import write_text
from pcka.engine.seeds import CONFIDENCE, mean_and_deviation, paired_differences, verdict

HOW_TO_READ = (
    f"a difference is stated where the {CONFIDENCE:.0%} interval of the paired differences "
    "excludes 0 (paired t test, each row against the first, one at a time)."
)

# Keys that differ between the runs, and the options that set them.
KEYS_OF_RUNS = {"SEED": "--seeds", "OUTPUT_DIR": "--output"}


def check_output(folder: Path) -> None:
    """Refuse the folder of a single run, whose report the comparison's would replace.

    Raises:
        ConfigError: it holds the configuration of a run.
    """
    if (folder / "config.yaml").exists():
        raise ConfigError(f"--output: {folder} holds a run; give a comparison another folder")


def pairs_of_run(overrides: Sequence[str], seed: int, folder: Path) -> list[str]:
    """Return the ``KEY VALUE`` pairs of one run: those given for it, its seed and its folder.

    Raises:
        ConfigError: the given pairs set the seed or the folder.
    """
    for key, _ in pairs_of(overrides):
        if key in KEYS_OF_RUNS:
            raise ConfigError(f"{key}: each run has its own; use {KEYS_OF_RUNS[key]} instead")
    return [*overrides, "SEED", str(seed), "OUTPUT_DIR", str(folder)]


@dataclass
class Comparison:
    """Results of several methods over seeds, the others compared with the first.

    Attributes:
        methods: in table order.
        metrics: result key -> column heading; differences are those of the first metric.
        subject: heading of the method column.
        difference: heading of the difference column.
        also_in_csv: further result keys, written to ``comparison.csv`` but not shown in the table.
        heading: what was compared; shown above the table.
        extra: heading of a further column -> method -> cell.
        results: method -> seed -> result.
        failures: method -> seed -> message.
    """

    methods: Sequence[str]
    metrics: Mapping[str, str]
    subject: str = "method"
    difference: str = "minus first row"
    also_in_csv: Sequence[str] = ()
    heading: str = ""
    extra: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    results: dict[str, dict[int, Mapping[str, Any]]] = field(default_factory=dict)
    failures: dict[str, dict[int, str]] = field(default_factory=dict)

    def add(self, method: str, seed: int, result: Mapping[str, Any] | TrainingFailedError) -> None:
        """Add the result or the failure of a run."""
        if isinstance(result, TrainingFailedError):
            self.failures.setdefault(method, {})[seed] = str(result)
        else:
            self.results.setdefault(method, {})[seed] = result

    def values(self, method: str, key: str | None = None) -> dict[int, float]:
        """Seed -> value of a metric, the first one if ``key`` is None."""
        key = next(iter(self.metrics)) if key is None else key
        return {seed: float(r[key]) for seed, r in self.results.get(method, {}).items()}

    def rows(self) -> list[dict[str, str]]:
        """The rows of the table: for each method, a mapping from heading to cell."""
        return [self._row(method) for method in self.methods]

    def _row(self, method: str) -> dict[str, str]:
        failed = len(self.failures.get(method, {}))
        seeds = str(len(self.results.get(method, {}))) + (f" ({failed} failed)" if failed else "")
        row = {self.subject: method, "seeds": seeds}
        for key, heading in self.metrics.items():
            row[heading] = mean_and_deviation(self.values(method, key).values())
        first = self.methods[0]
        pairs = paired_differences(self.values(method), self.values(first))
        pairs = [] if method == first else pairs
        row[self.difference] = mean_and_deviation(pairs, signed=True)
        row["difference"] = verdict(pairs)
        return row | {heading: cells.get(method, "") for heading, cells in self.extra.items()}

    def table(self) -> str:
        """The table in Markdown, without empty columns."""
        headings, rows = self.cells()
        return tabulate(rows, headers=headings, tablefmt="github", disable_numparse=True)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows of the table, without empty columns."""
        rows = self.rows()
        kept = [heading for heading in rows[0] if any(row[heading] for row in rows)]
        return kept, [[row[heading] for heading in kept] for row in rows]

    def latex(self) -> str:
        r"""The table in LaTeX, which needs ``\usepackage{booktabs}``."""
        headings, rows = self.cells()
        align = ["left"] + ["right"] * (len(headings) - 1)
        text = tabulate(
            rows,
            headers=headings,
            tablefmt="latex_booktabs",
            disable_numparse=True,
            colalign=align,
        )
        # A true minus sign before figures, instead of a hyphen.
        text = re.sub(r"(?<![\w-])-(?=\d)", "$-$", text.replace("±", r"$\pm$"))
        return f"% needs \\usepackage{{booktabs}}\n{text}\n"

    def markdown(self) -> str:
        """Heading, table and failures."""
        parts = [self.heading] * bool(self.heading) + [self.table()]
        for method, by_seed in self.failures.items():
            parts += ["\n".join(f"{method}, seed {seed}: {text}" for seed, text in by_seed.items())]
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """CSV with one line for each run that has a result."""
        keys = [*self.metrics, *self.also_in_csv]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([self.subject, "seed", *keys])
        for method in self.methods:
            for seed, result in sorted(self.results.get(method, {}).items()):
                writer.writerow([method, seed, *(result[key] for key in keys)])
        return text.getvalue()

    def write(self, folder: Path) -> None:
        """Write ``comparison.md``, ``.csv``, ``.tex`` and ``.png``, in the first process."""
        if rank() > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "comparison.md", self.markdown())
        write_text(folder / "comparison.csv", self.csv())
        write_text(folder / "comparison.tex", self.latex())
        self.figure().savefig(folder / "comparison.png", dpi=120)

    def figure(self) -> Figure:
        """Each run's first metric as a point, the means as bars."""
        methods = [method for method in reversed(self.methods) if self.values(method)]
        figure = Figure(figsize=(7, 0.9 + 0.32 * max(len(methods), 1)), layout="constrained")
        axes = figure.subplots()
        for row, method in enumerate(methods):
            values = list(self.values(method).values())
            colour, _ = method_style(list(self.methods).index(method))
            axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.6)
            axes.plot([statistics.fmean(values)] * 2, [row - 0.3, row + 0.3], "k-")
        axes.set_yticks(range(len(methods)), methods)
        axes.set_xlabel(f"{next(iter(self.metrics.values()))}: points are seeds, bars are means")
        axes.set_ylim(-0.6, max(len(methods), 1) - 0.4)
        axes.grid(axis="x", alpha=0.3)
        return figure
