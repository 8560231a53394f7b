"""The report of a detector's run: ``python detection/report.py OUTPUT_DIR``.

It writes one HTML file with embedded pictures, and the same numbers as JSON.
"""

from __future__ import annotations

import detection

# isort: split

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader
from torch import nn

import detection.meta_arch  # noqa: F401  (registers itself)
from detection.arguments import report_parser
from detection.checkpoint import load_weights
from detection.config import (
    DISTILLED,
    build_student,
    load_config,
    student_architecture,
    teacher_config,
)
from detection.data import register_datasets
from detection.data.targets import SEGMENTER, first_test_set
from detection.evaluation import evaluate
from detection.figures import read_metrics, run_panels
from detection.grams import level_grams
from detection.levels import reads_levels
from detection.pictures import LEAST_OVERLAP, LEAST_SCORE, MOST_DETECTIONS, found_figure
from detection.preflight import usable_device
from detection.results import Results, by_task, class_figures, class_metric, read_result
from detection.schedule import schedule_doubts
from detection.settings import CONFIG, RESULT
from detection.teacher import take_channels
from pcka.analysis.gram_figure import grams_figure
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError, flatten
from pcka.engine.curves import TEACHER_COLOUR, method_style, panel_figure
from pcka.engine.environment import describe_environment, saved_environment
from pcka.engine.model_cost import ModelSize, latencies, model_size
from pcka.engine.report import Card, Picture, Report, Section, Table
from pcka.engine.report_pictures import class_figure
from pcka.engine.report_sections import run_section
from pcka.modes import evaluation_mode

WEIGHTS = "model_final.pth"
STUDENT, TEACHER, BASELINE = "student", "teacher", "baseline"
HARDLY = 1.0  # AP in percent, below which a detector finds next to nothing


@dataclass(frozen=True)
class Measured:
    """The cost of a detector.

    Attributes:
        size: size of the model.
        milliseconds: median latency of one image.
        file_bytes: size of its weights file.
    """

    size: ModelSize
    milliseconds: float
    file_bytes: int


def make_report(
    folder: Path, *, with_teacher: bool = False, baseline: Path | None = None, images: int = 4
) -> Report:
    """Measure the detectors of a run, and assemble the report.

    The metrics are those of the finished run; the student is not evaluated again.

    Args:
        folder: ``OUTPUT_DIR`` of a finished run.
        with_teacher: also evaluate the teacher, in one pass over the test set.
        baseline: ``OUTPUT_DIR`` of a run whose metrics are shown for comparison.
        images: number of images to draw detections on.

    Raises:
        ConfigError: the run is not finished, or the weights are not the detector's.
    """
    check_finished(folder)
    cfg = load_config(str(folder / CONFIG), [])
    cfg.MODEL.DEVICE = usable_device(cfg.MODEL.DEVICE)
    register_datasets(cfg, training=False)
    results = {STUDENT: read_result(folder)}
    if baseline is not None:
        results = {BASELINE: _baseline_result(baseline, cfg), **results}
    models, files, warnings = _models(cfg, folder)
    if with_teacher and TEACHER in models:
        results = {TEACHER: _evaluated(cfg, models[TEACHER]), **results}
    found = _measure(cfg, models, files)
    alignments = alignments_of(folder)
    warnings += run_doubts(cfg, results[STUDENT])
    here = describe_environment(cfg.SEED, torch.device(cfg.MODEL.DEVICE))
    environment = saved_environment(folder) or here
    taught = cfg.MODEL.META_ARCHITECTURE == DISTILLED
    architecture = cfg.DISTILL.STUDENT if taught else cfg.MODEL.META_ARCHITECTURE
    methods = " + ".join(cfg.DISTILL.METHODS) if taught else "without a teacher"
    return Report(
        title=f"{architecture} on {', '.join(cfg.DATASETS.TEST)}",
        lead=f"{methods}, {cfg.SOLVER.MAX_ITER:,} steps of {cfg.SOLVER.IMS_PER_BATCH} images.",
        cards=list(_cards(results, found, alignments)),
        warnings=warnings,
        sections=[
            _metrics_section(results),
            *_training_sections(folder),
            *_class_sections(results),
            _picture_section(cfg, models, images),
            *(_gram_sections(cfg, folder / WEIGHTS) if TEACHER in models else []),
            _cost_section(found, str(here["device"])),
            run_section(cfg, get_cfg(), environment),
        ],
        data={
            "kind": "detector",
            "student": architecture,
            "methods": list(cfg.DISTILL.METHODS) if taught else [],
            "metrics": results,
            "cka": alignments,
            "curves": read_metrics(folder / "metrics.json"),
            "cost": {name: _cost_data(own) for name, own in found.items()},
            "config": flatten(cfg),
            "environment": environment,
        },
    )


def check_finished(folder: Path) -> None:
    """Refuse a folder that does not hold a finished run.

    Raises:
        ConfigError: a file is missing; the message names it.
    """
    for name in (CONFIG, RESULT, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{folder}: expected the folder of a finished detector, found no {name}; give "
                "the OUTPUT_DIR of such a run"
            )


def _baseline_result(folder: Path, cfg: CfgNode) -> Results:
    """Return the metrics of another run on the same test sets."""
    check_finished(folder)
    own, theirs = (flatten(of.DATASETS) for of in (cfg, load_config(str(folder / CONFIG), [])))
    for key, value in own.items():
        if "TEST" in key and theirs.get(key) != value:
            raise ConfigError(
                f"--baseline: {folder} was evaluated on other images, DATASETS.{key} is "
                f"{theirs.get(key)!r} there and {value!r} here; give a run on the same test set"
            )
    return read_result(folder)


def alignments_of(folder: Path) -> dict[str, float]:
    """Level -> CKA with the teacher, as last measured in a run."""
    curves = read_metrics(folder / "metrics.json")
    return {
        key.removeprefix("cka/"): points[-1][1]
        for key, points in sorted(curves.items())
        if key.startswith("cka/")
    }


def _models(cfg: CfgNode, folder: Path) -> tuple[dict[str, nn.Module], dict[str, Path], list[str]]:
    """Return the detectors with weights, teacher first, their files, and warnings about it.

    All of them take the student's images.
    """
    models, files, warnings = {}, {STUDENT: folder / WEIGHTS}, []
    wanted = cfg.DISTILL.TEACHER
    if cfg.MODEL.META_ARCHITECTURE == DISTILLED and wanted.CONFIG_FILE:
        try:
            file = Path(wanted.WEIGHTS)
            if not file.is_file():
                raise ConfigError(f"there is no file {wanted.WEIGHTS!r}")
            own = teacher_config(cfg)
            teacher = build_student(own, "DISTILL.TEACHER").to(cfg.MODEL.DEVICE)
            load_weights(teacher, str(file))
            models[TEACHER] = take_channels(teacher, own.INPUT.FORMAT, cfg.INPUT.FORMAT)
            files[TEACHER] = file
        except ValueError as error:  # e.g. the file holds only a backbone, or was moved
            warnings = [f"The teacher is left out: {error}"]
    models[STUDENT] = build_student(cfg).to(cfg.MODEL.DEVICE)
    load_weights(models[STUDENT], str(files[STUDENT]))
    return models, files, warnings


def _evaluated(cfg: CfgNode, teacher: nn.Module) -> Results:
    aside = cfg.clone()
    aside.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, "teacher"))
    return by_task(evaluate(aside, teacher))


class _OfImage(nn.Module):
    """A detector as a function of an image tensor, which can be traced.

    Args:
        model: detectron2 detector.
        entry: entry of the data loader; its image is replaced.
    """

    def __init__(self, model: nn.Module, entry: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.entry = entry

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Image ``(C, H, W)`` -> all tensors in the model's output."""
        (found,) = self.model([{**self.entry, "image": image}])
        fields = found["instances"].get_fields() if "instances" in found else found
        return tuple(getattr(field, "tensor", field) for field in fields.values())


def _measure(
    cfg: CfgNode, models: Mapping[str, nn.Module], files: Mapping[str, Path]
) -> dict[str, Measured]:
    """Measure size and latency of every detector, on the first image of the test set."""
    entry = next(iter(build_detection_test_loader(cfg, first_test_set(cfg))))
    calls = {name: lambda model=model: model(entry) for name, model in models.items()}
    with evaluation_mode(*models.values()):
        times = latencies(calls, torch.device(cfg.MODEL.DEVICE))
    return {
        name: Measured(
            model_size(_OfImage(model, entry[0]), entry[0]["image"]),
            times[name],
            files[name].stat().st_size,
        )
        for name, model in models.items()
    }


def run_doubts(cfg: CfgNode, results: Results) -> Iterator[str]:
    """Yield warnings about probable mistakes in a finished run, one or two sentences each."""
    yield from schedule_doubts(cfg)
    for task, metrics in results.items():
        value = metrics.get("AP")
        if value is not None and value < HARDLY:
            yield (
                f"The student finds next to nothing ({task} AP {value:.2f}): train it longer "
                "(SOLVER.MAX_ITER), or start it from weights (MODEL.WEIGHTS, DISTILL.INHERIT)"
            )


def _cards(
    results: Mapping[str, Results],
    found: Mapping[str, Measured],
    alignments: Mapping[str, float],
) -> Iterator[Card]:
    for task, metrics in results[STUDENT].items():
        for metric in ("AP", "AP50", "mIoU"):
            if metric in metrics:
                others = {
                    name: _text(results[name].get(task, {}).get(metric))
                    for name in (TEACHER, BASELINE)
                    if name in results
                }
                note = ", ".join(f"{name} {value}" for name, value in others.items() if value)
                yield Card(f"{task} {metric}", _text(metrics[metric]), note)
    if alignments:
        mean = sum(alignments.values()) / len(alignments)
        yield Card("CKA with the teacher", f"{mean:.3f}", f"mean of {len(alignments)} levels")
    own, other = found[STUDENT], found.get(TEACHER)
    yield Card(
        "parameters",
        f"{own.size.parameters / 1e6:.1f} M",
        "" if other is None else f"{other.size.parameters / own.size.parameters:.1f} times fewer",
    )
    yield Card(
        "latency",
        f"{own.milliseconds:.3g} ms",
        "" if other is None else f"{other.milliseconds / own.milliseconds:.1f} times faster",
    )


def _metrics_section(results: Mapping[str, Results]) -> Section:
    """The overall evaluation metrics, in one table per task."""
    tables = []
    for task, metrics in results[STUDENT].items():
        names = [name for name in metrics if "-" not in name]
        rows = [
            [who, *(_text(of_task.get(task, {}).get(name)) for name in names)]
            for who, of_task in results.items()
        ]
        tables.append(Table([task, *names], rows))
    return Section("Metrics", "In percent, on the test set.", tables=tables)


def _text(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}"


def _class_sections(results: Mapping[str, Results]) -> Iterator[Section]:
    """Yield a section with AP or IoU by class for each task."""
    styles = {
        TEACHER: (TEACHER_COLOUR, "--"),
        STUDENT: method_style(0),
        BASELINE: method_style(1),
    }
    for task, classes, figures in class_figures(results):
        rows = [
            [name, *(_text(values[i]) for values in figures.values())]
            for i, name in enumerate(classes)
        ]
        metric = class_metric(task)
        figure = class_figure(figures, classes, styles, f"{metric} (%)")
        yield Section(
            f"Classes ({task})",
            pictures=[Picture(f"{metric} by class", figure)],
            folded={f"{metric} of every class": Table(["class", *figures], rows)},
        )


def _training_sections(folder: Path) -> list[Section]:
    pictures = [
        Picture(panel.title, panel_figure(panel, x="step"))
        for panel in run_panels(str(folder))
        if panel.curves
    ]
    return [Section("Training", pictures=pictures)] if pictures else []


def _picture_section(cfg: CfgNode, models: Mapping[str, nn.Module], images: int) -> Section:
    figure = found_figure(cfg, models, images)
    if student_architecture(cfg) == SEGMENTER:
        picture = Picture("The class of each pixel", figure, wide=True, raster=True)
        return Section("Pixels", "The first images of the test set.", pictures=[picture])
    return Section(
        "Detections",
        f"The first images of the test set, each with its {MOST_DETECTIONS} most confident "
        f"detections with a score of {LEAST_SCORE} or more. A hit "
        f"overlaps an object of its class by {LEAST_OVERLAP} or more (intersection over union).",
        pictures=[Picture("Hits and misses", figure, wide=True, raster=True)],
    )


def _gram_sections(cfg: CfgNode, weights: Path) -> Iterator[Section]:
    """The Grams that PCKA compares at each level, on the first image of the test set."""
    if not reads_levels(cfg.DISTILL.METHODS):
        return
    try:
        grams = level_grams(cfg, weights)
    except ConfigError as error:
        yield Section("Grams", f"There are none: {error}")
        return
    yield Section(
        "Grams",
        "How similar the patches of the first test image are: mean over channels of the centered "
        "Grams, each of norm 1. Row and column i are patch i, counted row by row. The CKA is the "
        "mean over channels.",
        pictures=[Picture("Grams of the levels", grams_figure(*grams), wide=True, raster=True)],
    )


def _cost_section(found: Mapping[str, Measured], device: str) -> Section:
    rows = [
        [
            name,
            f"{own.size.parameters:,}",
            "" if own.size.macs is None else f"{own.size.macs / 1e9:,.2f}",
            f"{own.file_bytes / 2**20:,.1f}",
            f"{own.milliseconds:.3g}",
        ]
        for name, own in found.items()
    ]
    return Section(
        "Cost",
        tables=[
            Table(
                ["", "parameters", "MACs (billions)", "file (MiB)", "ms per image"],
                rows,
                "MACs and latency on the first image of the test set, with all steps from "
                f"normalisation to boxes, on this machine ({device}): median after warm-up, models "
                "interleaved. A run's file also contains its optimizer.",
            )
        ],
    )


def _cost_data(own: Measured) -> dict[str, Any]:
    return {
        "parameters": own.size.parameters,
        "state_bytes": own.size.state_bytes,
        "macs": own.size.macs,
        "file_bytes": own.file_bytes,
        "latency_ms": own.milliseconds,
    }


def main(arguments: Sequence[str] | None = None) -> Path:
    """Write the report given by the arguments; print and return the path of the page."""
    given = report_parser().parse_args(arguments)
    report = make_report(
        given.run, with_teacher=given.teacher, baseline=given.baseline, images=given.images
    )
    path = report.write(given.output or given.run)
    print(path)
    return path


if __name__ == "__main__":
    run_command(main)
