"""A table with the paper's figures next to ours."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping

from pcka.engine.comparison import HOW_TO_READ, Comparison
from tools.paper.table import TEACHER, Plan, Run, State

States = Mapping[Run, State]


def of_students(states: States) -> dict[Run, State]:
    """The states without those of teachers."""
    return {run: state for run, state in states.items() if run.method != TEACHER}


def compare(plan: Plan, pair: str, metrics: Mapping[str, str], states: States) -> Comparison:
    """Return the comparison of a pair's finished runs, with the published figures.

    Args:
        plan: its methods are compared.
        pair: of teacher and student.
        metrics: result key -> heading.
        states: of all runs.
    """
    table = plan.table
    own = {run: state for run, state in of_students(states).items() if run.pair == pair}
    methods = [*plan.methods]
    if set(methods) == set(table.methods):
        methods += table.keys["NOT_HERE"]
    comparison = Comparison(methods, metrics, difference="minus first row")
    for run, state in own.items():
        if state.result is not None:
            comparison.add(run.method, run.seed, state.result)
    comparison.extra = {
        **_published(plan, pair, methods),
        f"{_comparable(metrics)} minus published": _differences(comparison, plan, pair),
        "missing": {method: _missing(plan, method, own) for method in methods},
    }
    return comparison


def _comparable(metrics: Mapping[str, str]) -> str:
    """Heading of the metric in the first published column: the best epoch's, if there is one."""
    return metrics.get("best_accuracy", next(iter(metrics.values())))


def _published(plan: Plan, pair: str, methods: Iterable[str]) -> dict[str, dict[str, str]]:
    """Heading -> method -> figure."""
    figures = {method: plan.table.published(pair, method) for method in methods}
    return {
        f"published {column}": {
            method: f"{by_column[column]:.2f}"
            for method, by_column in figures.items()
            if column in by_column
        }
        for column in plan.table.keys["COLUMNS"]
    }


def _differences(comparison: Comparison, plan: Plan, pair: str) -> dict[str, str]:
    """Method -> our mean minus the published figure in the first column."""
    metrics, column = comparison.metrics, plan.table.keys["COLUMNS"][0]
    (key,) = (key for key, heading in metrics.items() if heading == _comparable(metrics))
    cells = {}
    for method in comparison.methods:
        values = comparison.values(method, key).values()
        published = plan.table.published(pair, method).get(column)
        if values and published is not None:
            cells[method] = f"{statistics.fmean(values) - published:+.2f}"
    return cells


def _missing(plan: Plan, method: str, states: States) -> str:
    if method not in plan.table.methods:
        return "not built in"
    seeds = [str(run.seed) for run, s in states.items() if run.method == method and not s.done]
    return f"seed {', '.join(seeds)}" if seeds else ""


def markdown(plan: Plan, metrics: Mapping[str, str], states: States) -> str:
    """The table in Markdown, one section per pair."""
    counted = of_students(states).values()
    done = sum(state.done for state in counted)
    parts = [
        f"# {plan.table.name}",
        f"{plan.table.keys['TITLE']}. {done} of {len(counted)} runs are finished. Ours: mean ± "
        f"standard deviation over seeds; {HOW_TO_READ}",
    ]
    if plan.overrides:
        parts.append(f"Keys of all runs: {' '.join(plan.overrides)}.")
    for pair in plan.pairs:
        parts += [f"## {pair}", compare(plan, pair, metrics, states).markdown().rstrip()]
    return "\n\n".join(parts) + "\n"


def lines(plan: Plan, metrics: Mapping[str, str], states: States) -> str:
    """CSV with one line per run, finished or not."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = plan.table.keys["COLUMNS"]
    published = [f"published {column}" for column in columns]
    writer.writerow(["pair", "method", "seed", "state", *metrics, *published])
    for run, state in of_students(states).items():
        result, figures = state.result or {}, plan.table.published(run.pair, run.method)
        ours = [_cell(result.get(key)) for key in metrics]
        theirs = [_cell(figures.get(column)) for column in columns]
        writer.writerow([run.pair, run.method, run.seed, state.text, *ours, *theirs])
    return text.getvalue()


def _cell(value: float | None) -> float | str:
    return "" if value is None or math.isnan(value) else value
