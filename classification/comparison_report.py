"""The report of a comparison: its table, and the students of one seed beside their teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from classification.config import default_config, teacher_name
from classification.data import load_image_sets
from classification.report import Material, load_subjects, run_doubts
from classification.report_figures import (
    TEACHER,
    as_data,
    as_text,
    calibration_section,
    class_section,
    measure,
    overview,
    stage_tables,
)
from pcka.analysis import CKATable
from pcka.engine.comparison import Comparison
from pcka.engine.config import flatten
from pcka.engine.curves import Panel, gradients_figure, panel_figure
from pcka.engine.environment import choose_device, describe_environment
from pcka.engine.report import Picture, Report, Section, Table
from pcka.engine.report_sections import mean_curve, method_cards, run_section, table_section


def make_comparison_report(
    comparison: Comparison, folders: Mapping[str, Mapping[int, Path]]
) -> Report:
    """Measure the students of the first seed and build the report.

    Args:
        comparison: with its results.
        folders: method -> seed -> folder of a run that produced a result, in the table's order; at
            least one.

    Raises:
        ConfigError: data or weights that do not fit.
    """
    runs = {
        m: {s: Material.of_run(f) for s, f in by_seed.items()} for m, by_seed in folders.items()
    }
    shown = {method: next(iter(by_seed.values())) for method, by_seed in runs.items()}
    lead = next(iter(shown.values())).cfg
    device = choose_device(lead.DEVICE)
    there = lead.clone()
    there.defrost()
    there.DATA.DOWNLOAD = False  # the runs had the data, and no process would wait for a download
    train_set, data = (one.to(device) for one in load_image_sets(there))
    students = {m: (run.cfg, next(iter(run.students.values()))) for m, run in shown.items()}
    subjects, warnings = load_subjects(lead, students, (train_set, data))
    found = measure(subjects, train_set, data)
    tables = stage_tables(subjects, data)
    for method, run in shown.items():
        said = run_doubts(run, subjects[method], found, method, (train_set, data))
        warnings += [f"{method}: {text}" for text in said]
    teacher = found.get(TEACHER)
    environment = describe_environment(lead.SEED, device)
    pictures = list(_training(runs, None if teacher is None else teacher.top1))
    first_seeds = sorted({seed for by_seed in folders.values() for seed in list(by_seed)[:1]})
    seeds = ", ".join(map(str, first_seeds))
    sections = [
        table_section(comparison),
        *([Section("Training", pictures=pictures)] if pictures else []),
        overview(found, str(environment["device"]), len(data), f"Students of seed {seeds}."),
        class_section(found, data.classes, confusions=False),
        calibration_section(found),
        *([_stage_section(tables)] if tables else []),
        run_section(lead, default_config(), environment),
    ]
    taught = f" taught by {teacher_name(lead)}" if lead.TEACHER.NAME else ""
    return Report(
        title=f"{lead.STUDENT.NAME}{taught}: {len(comparison.methods)} methods",
        lead=comparison.heading,
        cards=list(method_cards(comparison)),
        warnings=warnings,
        sections=sections,
        data={
            "kind": "comparison of classifiers",
            "rows": comparison.rows(),
            "results": comparison.results,
            "failures": comparison.failures,
            "classes": list(data.classes),
            "models": as_data(found, data.classes),
            "cka": {name: table.values.tolist() for name, table in tables.items()},
            "config": flatten(lead),
            "environment": environment,
        },
    )


def _training(
    runs: Mapping[str, Mapping[int, Material]], teacher: float | None
) -> Iterator[Picture]:
    """Yield accuracy by epoch, averaged over seeds, and the gradients of one seed."""
    across = {} if teacher is None else {TEACHER: teacher}
    curves = {
        method: mean_curve([_points(run.metrics) for run in by_seed.values()])
        for method, by_seed in runs.items()
    }
    if any(curves.values()):
        panel = Panel("", "accuracy (%)", curves, from_zero=False, across=across)
        yield Picture("Top-1 accuracy, mean over seeds", panel_figure(panel, x="epoch"))
    of_one_seed = {method: next(iter(by_seed.values())).metrics for method, by_seed in runs.items()}
    figure = gradients_figure(of_one_seed)
    if figure is not None:
        yield Picture("Gradients of the terms", figure, wide=True)


def _points(metrics: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    return [(entry["epoch"], entry["accuracy"]) for entry in metrics if "accuracy" in entry]


def _stage_section(tables: Mapping[str, CKATable]) -> Section:
    """CKA of each stage with the teacher's stage at the same position from the end."""
    most = max(min(table.values.shape) for table in tables.values())
    rows = []
    for name, table in tables.items():
        values = table.values.flip(0, 1).diagonal().flip(0).tolist()
        rows.append([name, *[""] * (most - len(values)), *map(as_text, values)])
    headings = ["", *("last" if i == 0 else f"last - {i}" for i in range(most - 1, -1, -1))]
    return Section(
        "Stages",
        "Minibatch CKA (unbiased) of a stage with the teacher's, counted from the last one, on up "
        "to 512 evaluation images.",
        tables=[Table(headings, rows)],
    )
