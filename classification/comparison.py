"""The table of a comparison: figures, their spread, and which differences are more than noise."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from matplotlib.figure import Figure

from classification.cost import Cost
from classification.published import published_accuracy
from pcka.engine.command import TrainingFailedError
from pcka.engine.run_folder import write_text
from pcka.engine.seeds import CONFIDENCE, mean_and_deviation, paired_differences, verdict

COLUMNS = (
    "method", "seeds", "last epoch (%)", "best epoch (%)", "minus first row (%)", "difference",
    "published (%)", "step (ms/image)", "step / first row", "memory (MiB)",
)  # fmt: skip

Result = Mapping[str, Any]


@dataclass
class Comparison:
    """Results of several methods over seeds.

    Attributes:
        cfg: one run's configuration; all share what is not in ``DISTILL``.
        methods: in the order of the table; the others are compared with the first.
        results: method -> seed -> result.
        failures: method -> seed -> message.
        costs: method -> what a step costs, once that is measured.
    """

    cfg: CfgNode
    methods: Sequence[str]
    results: dict[str, dict[int, Result]] = field(default_factory=dict)
    failures: dict[str, dict[int, str]] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)

    def add(self, method: str, seed: int, result: Result | TrainingFailedError) -> None:
        """Take in what a run came to."""
        if isinstance(result, TrainingFailedError):
            self.failures.setdefault(method, {})[seed] = str(result)
        else:
            self.results.setdefault(method, {})[seed] = result

    def accuracies(self, method: str, key: str = "last_accuracy") -> dict[int, float]:
        """Seed -> accuracy, percent."""
        return {seed: float(r[key]) for seed, r in self.results.get(method, {}).items()}

    def rows(self) -> list[dict[str, str]]:
        """The table, a mapping of :data:`COLUMNS` for each method."""
        return [self._row(method) for method in self.methods]

    def _row(self, method: str) -> dict[str, str]:
        first = self.methods[0]
        row = dict.fromkeys(COLUMNS, "")
        row["method"] = method
        accuracies = self.accuracies(method)
        failed = len(self.failures.get(method, {}))
        row["seeds"] = str(len(accuracies)) + (f" ({failed} failed)" if failed else "")
        row["last epoch (%)"] = mean_and_deviation(accuracies.values())
        row["best epoch (%)"] = mean_and_deviation(
            self.accuracies(method, "best_accuracy").values()
        )
        if method != first:
            pairs = paired_differences(accuracies, self.accuracies(first))
            row["minus first row (%)"] = mean_and_deviation(pairs, signed=True)
            row["difference"] = verdict(pairs)
        if (published := published_accuracy(self.cfg, method)) is not None:
            row["published (%)"] = f"{published:.2f}"
        if method in self.costs:
            cost, of_first = self.costs[method], self.costs[first]
            row["step (ms/image)"] = f"{cost.milliseconds:.3f}"
            row["step / first row"] = f"{cost.milliseconds / of_first.milliseconds:.2f}"
            row["memory (MiB)"] = f"{cost.mebibytes:.0f}"
        return row

    def heading(self) -> str:
        """What was compared, in a sentence or two."""
        cfg = self.cfg
        some = next((r for by_seed in self.results.values() for r in by_seed.values()), {})
        teacher = some.get("teacher_accuracy")
        taught = f" from {cfg.TEACHER.NAME} ({teacher:.2f} %)" if teacher is not None else ""
        return (
            f"{cfg.STUDENT.NAME}{taught} on {cfg.DATA.NAME}: {some.get('training_images', '?')} "
            f"training and {some.get('evaluation_images', '?')} evaluation images, "
            f"{cfg.SOLVER.EPOCHS} epochs, batch {cfg.SOLVER.BATCH_SIZE}. Top-1 accuracy, mean ± "
            "standard deviation over seeds. Runs of one seed share start, order and augmentation; "
            f"a difference is named where the {CONFIDENCE:.0%} interval of the paired differences "
            "leaves out 0 (paired t test, each method against the first, one at a time)."
        )

    def markdown(self) -> str:
        """Heading and table; columns that nobody has are left out."""
        rows = self.rows()
        columns = [name for name in COLUMNS if any(row[name] for row in rows)]
        lines = [self.heading(), "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
        lines += [f"| {' | '.join(row[name] for name in columns)} |" for row in rows]
        for method, by_seed in self.failures.items():
            lines += ["", *(f"{method}, seed {seed}: {text}" for seed, text in by_seed.items())]
        return "\n".join(lines) + "\n"


def write_comparison(comparison: Comparison, output: Path) -> None:
    """Write ``comparison.md``, ``comparison.csv`` (one line a run) and ``comparison.png``."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "comparison.md", comparison.markdown())
    write_text(output / "comparison.csv", _csv(comparison))
    _plot(comparison, output / "comparison.png")


def _csv(comparison: Comparison) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", "last_accuracy", "best_accuracy", "best_epoch", "epochs"])
    for method in comparison.methods:
        for seed, result in sorted(comparison.results.get(method, {}).items()):
            keys = ("last_accuracy", "best_accuracy", "best_epoch", "epochs")
            writer.writerow([method, seed, *(result[key] for key in keys)])
    return text.getvalue()


def _plot(comparison: Comparison, path: Path) -> None:
    """Draw each run as a point and the means as lines."""
    methods = [m for m in reversed(comparison.methods) if comparison.accuracies(m)]
    figure = Figure(figsize=(7, 0.9 + 0.32 * max(len(methods), 1)), layout="constrained")
    axes = figure.subplots()
    for row, method in enumerate(methods):
        values = list(comparison.accuracies(method).values())
        axes.plot(values, [row] * len(values), "o", alpha=0.6)
        axes.plot([statistics.fmean(values)] * 2, [row - 0.3, row + 0.3], "k-")
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xlabel("Top-1 accuracy after the last epoch (%); a point a seed, a bar the mean")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
