"""The report of a comparison of detectors: its table, their curves, and per-class metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from detectron2.config import get_cfg

from detection.config import load_config
from detection.figures import read_metrics
from detection.preflight import usable_device
from detection.report import alignments_of
from detection.results import class_figures, class_metric, read_result
from detection.settings import CONFIG
from pcka.engine.comparison import Comparison
from pcka.engine.curves import Panel, method_style, panel_figure
from pcka.engine.environment import describe_environment
from pcka.engine.report import Picture, Report, Section, Table
from pcka.engine.report_pictures import class_figure
from pcka.engine.report_sections import mean_curve, method_cards, run_section, table_section


def make_comparison_report(
    comparison: Comparison, folders: Mapping[str, Mapping[int, Path]]
) -> Report:
    """Assemble the report of a comparison; no detector is run.

    Args:
        comparison: the comparison with its results.
        folders: run name -> seed -> folder of a finished run, in the table's order; at least one.
    """
    first = {name: next(iter(by_seed.values())) for name, by_seed in folders.items()}
    cfg = load_config(str(next(iter(first.values())) / CONFIG), [])
    results = {name: read_result(folder) for name, folder in first.items()}
    alignments = {name: alignments_of(folder) for name, folder in first.items()}
    environment = describe_environment(cfg.SEED, torch.device(usable_device(cfg.MODEL.DEVICE)))
    styles = {name: method_style(i) for i, name in enumerate(comparison.methods)}
    pictures = list(_curves(comparison, folders))
    by_class = [
        Picture(
            f"{task} {class_metric(task)}",
            class_figure(figures, classes, styles, f"{class_metric(task)} (%)"),
        )
        for task, classes, figures in class_figures(results)
    ]
    return Report(
        title=f"{len(comparison.methods)} detectors on {', '.join(cfg.DATASETS.TEST)}",
        lead=comparison.heading,
        cards=list(method_cards(comparison)),
        warnings=[],
        sections=[
            table_section(comparison),
            *([Section("Training", pictures=pictures)] if pictures else []),
            *([Section("Classes", "For the first seed.", pictures=by_class)] if by_class else []),
            *_alignment_sections(alignments),
            run_section(cfg, get_cfg(), environment),
        ],
        data={
            "kind": "comparison of detectors",
            "rows": comparison.rows(),
            "results": comparison.results,
            "failures": comparison.failures,
            "metrics": results,
            "cka": alignments,
        },
    )


def _curves(comparison: Comparison, folders: Mapping[str, Mapping[int, Path]]) -> Iterator[Picture]:
    """Evaluation metrics by step, averaged over the seeds."""
    read = {
        name: [read_metrics(folder / "metrics.json") for folder in by_seed.values()]
        for name, by_seed in folders.items()
    }
    for key in ("bbox/AP", "segm/AP", "sem_seg/mIoU"):
        curves = {
            name: mean_curve([metrics.get(key, []) for metrics in read.get(name, [{}])])
            for name in comparison.methods
        }
        if any(curves.values()):
            panel = Panel("", "%", curves)
            yield Picture(f"{key}, mean over seeds", panel_figure(panel, x="step"))


def _alignment_sections(alignments: Mapping[str, Mapping[str, float]]) -> list[Section]:
    levels = sorted({level for own in alignments.values() for level in own})
    if not levels:
        return []
    rows = [
        [name, *(f"{own[level]:.3f}" if level in own else "" for level in levels)]
        for name, own in alignments.items()
    ]
    text = "CKA with the teacher at the last step that measured it, for the first seed."
    return [Section("Levels", text, tables=[Table(["", *levels], rows)])]
