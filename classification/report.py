"""The report of a classifier's run: ``python classification/report.py OUTPUT_DIR``.

One self-contained HTML file and the same figures as JSON, on the student and its teacher.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from classification.arguments import report_parser
from classification.batch_norm import lagging
from classification.config import default_config, doubts, load_config, teacher_name, teachers_of
from classification.data import ImageSet, load_image_sets, pixel_statistics, steps_per_epoch
from classification.evaluation import is_guessing
from classification.models import Classifier, model_of
from classification.models.taps import with_stages
from classification.report_figures import (
    TEACHER,
    Measured,
    Subject,
    as_data,
    calibration_section,
    class_section,
    measure,
    overview,
    stage_section,
    stage_tables,
)
from classification.teacher import ImageSets, as_one, teacher_file
from pcka.analysis.gradients import far_apart
from pcka.engine.class_names import CLASSES_FILE, read_class_names
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError, flatten
from pcka.engine.curves import classifier_panels, panel_figure
from pcka.engine.environment import choose_device, describe_environment, saved_environment
from pcka.engine.progress import console_log
from pcka.engine.report import Card, Picture, Report, Section
from pcka.engine.report_sections import run_section
from pcka.engine.run_folder import read_metrics

logger = logging.getLogger("pcka")

CONFIG, STUDENT = "config.yaml", "student"
BASELINE = "baseline"
# Keys of DATA that determine the evaluation images.
SAME_IMAGES = ("NAME", "TEST_PART", "HOLDOUT", "SPLIT_SEED", "IMAGE_SIZE")
STUDENTS = {STUDENT: "model_last.pth", "averaged student": "model_ema.pth"}  # of a run's folder


@dataclass(frozen=True)
class Material:
    """The input of a report.

    Attributes:
        cfg: gives data, models and losses.
        students: name -> weights file, or None if the model has its own; the report is about the
            first one.
        metrics: of the epochs; empty if the training is unknown.
        environment: of the training.
        baseline: configuration and weights of a student to compare with.
    """

    cfg: CfgNode
    students: Mapping[str, Path | None]
    metrics: Sequence[Mapping[str, float]] = ()
    environment: Mapping[str, Any] | None = None
    baseline: tuple[CfgNode, Path | None] | None = None

    @classmethod
    def of_run(cls, folder: Path, device: str = "") -> Material:
        """Read the folder of a run.

        Args:
            folder: its ``OUTPUT_DIR``.
            device: overrides the key ``DEVICE``, unless "".

        Raises:
            ConfigError: there is no run, or it has not saved a student.
        """
        config = folder / CONFIG
        files = {name: folder / file for name, file in STUDENTS.items()}
        for path in (config, files[STUDENT]):
            if not path.is_file():
                raise ConfigError(
                    f"{folder}: expected the folder of a classifier's run, found no "
                    f"{path.name}; give the OUTPUT_DIR of one that has finished an epoch"
                )
        cfg = load_config(config, ["DEVICE", device] if device else [])
        students: dict[str, Path | None] = {n: p for n, p in files.items() if p.is_file()}
        return cls(cfg, students, read_metrics(folder / "metrics.jsonl"), saved_environment(folder))

    def beside(self, folder: Path) -> Material:
        """Return a copy whose baseline is the student of another run on the same images.

        Raises:
            ConfigError: no such run, or one on other images.
        """
        other = Material.of_run(folder)
        for key in SAME_IMAGES:
            own, theirs = self.cfg.DATA[key], other.cfg.DATA[key]
            if own != theirs:
                raise ConfigError(
                    f"--baseline: {folder} was trained on other images, DATA.{key} is {theirs!r} "
                    f"there and {own!r} here; give a run on the same ones"
                )
        if self.classes != other.classes:
            raise ConfigError(
                f"--baseline: {folder} was trained on other classes ({', '.join(other.classes)}); "
                "give a run on the same ones"
            )
        return replace(self, baseline=(other.cfg, other.students[STUDENT]))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, from the folder of the run."""
        weights = self.students[STUDENT]
        assert weights is not None
        return read_class_names(weights.parent / CLASSES_FILE)


def make_report(material: Material, image_sets: ImageSets | None = None) -> Report:
    """Measure the models and build the report.

    Args:
        material: the input.
        image_sets: training and evaluation images, if already in memory.

    Raises:
        ConfigError: data or weights that do not fit.
    """
    cfg, device = material.cfg, choose_device(material.cfg.DEVICE)
    train_set, data = (one.to(device) for one in image_sets or load_image_sets(cfg))
    students = {name: (cfg, path) for name, path in material.students.items()}
    if material.baseline is not None:
        students[BASELINE] = material.baseline
    subjects, missing = load_subjects(cfg, students, (train_set, data))
    found = measure(subjects, train_set, data)
    tables = stage_tables(subjects, data)
    name = next(iter(material.students))
    warnings = [*missing, *run_doubts(material, subjects[name], found, name, (train_set, data))]
    environment = describe_environment(cfg.SEED, device)
    sections = [
        overview(found, str(environment["device"]), len(data)),
        *curve_sections(material.metrics, found),
        class_section(found, data.classes),
        calibration_section(found),
        *([stage_section(tables)] if tables else []),
        run_section(cfg, default_config(), material.environment or environment),
    ]
    taught = f" taught by {teacher_name(cfg)}" if cfg.TEACHER.NAME else ""
    return Report(
        title=f"{cfg.STUDENT.NAME}{taught}",
        lead=f"{' + '.join(cfg.DISTILL.METHODS)} on {cfg.DATA.NAME}: {len(train_set):,} training "
        f"and {len(data):,} evaluation images, {len(data.classes)} classes, "
        f"{_training(material.metrics)}.",
        cards=_cards(found, name),
        warnings=warnings,
        sections=sections,
        data={
            "kind": "classifier",
            "student": cfg.STUDENT.NAME,
            "teacher": teacher_name(cfg) or None,
            "methods": list(cfg.DISTILL.METHODS),
            "evaluation_images": len(data),
            "classes": list(data.classes),
            "models": as_data(found, data.classes),
            "cka": {name: table.values.tolist() for name, table in tables.items()},
            "metrics": list(material.metrics),
            "config": flatten(cfg),
            "environment": material.environment or environment,
        },
    )


def _training(metrics: Sequence[Mapping[str, float]]) -> str:
    """Describe the length of a training run."""
    seconds = sum(record.get("seconds", 0) for record in metrics)
    took = f" in {timedelta(seconds=round(seconds))} (h:mm:ss)" if seconds else ""
    return f"{len(metrics) or 'an unknown number of'} epochs{took}"


def load_subjects(
    cfg: CfgNode, students: Mapping[str, tuple[CfgNode, Path | None]], image_sets: ImageSets
) -> tuple[dict[str, Subject], list[str]]:
    """Return teacher and students with their weights, and a warning if the teacher has none.

    Args:
        cfg: gives the teacher.
        students: name -> configuration and weights file, None if the model has its own.
        image_sets: training and evaluation images, on the device.

    Raises:
        ConfigError: weights that do not fit the model.
    """
    train_set, data = image_sets
    subjects, missing = {}, []
    if cfg.TEACHER.NAME:
        each = teachers_of(cfg)
        files = [teacher_file(one, train_set) for one in each]
        absent = [str(path) for path in files if path is not None and not path.is_file()]
        if absent:
            missing = [f"The teacher is left out: there is no file {', '.join(absent)}."]
        else:
            given = zip(each, files)
            models = [_model(one, "teacher", file, len(data.classes)) for one, file in given]
            file = files[0] if len(files) == 1 else None
            subjects[TEACHER] = _subject(as_one(cfg, models), cfg.TEACHER, file, data)
    for name, (own, path) in students.items():
        model = _model(own, "student", path, len(data.classes))
        subjects[name] = _subject(model, own.STUDENT, path, data)
    return subjects, missing


def _model(cfg: CfgNode, role: str, weights: Path | None, classes: int) -> Classifier:
    model = model_of(cfg[role.upper()], classes, role=role, weights=weights or "")
    return with_stages(model, cfg.DATA.IMAGE_SIZE)


def _subject(model: Classifier, section: CfgNode, file: Path | None, data: ImageSet) -> Subject:
    return Subject(model.to(data.device), pixel_statistics(section).to(data.device), file)


def run_doubts(
    material: Material,
    student: Subject,
    found: Mapping[str, Measured],
    name: str,
    image_sets: ImageSets,
) -> Iterator[str]:
    """Yield warnings about what probably went wrong in a finished run, a sentence or two each."""
    cfg, (train_set, data) = material.cfg, image_sets
    losses = [record["loss_total"] for record in material.metrics if "loss_total" in record]
    at_chance = list(lagging(student.model, data, found[name].top1, losses))
    yield from at_chance
    for who in (TEACHER, name):
        top1 = found[who].top1 if who in found else 100.0
        if is_guessing(top1, len(data.classes), len(data)) and not (who == name and at_chance):
            yield f"The {who} is at chance: top-1 {top1:.2f} %, {len(data.classes)} classes."
    if not material.metrics:
        return
    updates = cfg.SOLVER.EPOCHS * steps_per_epoch(train_set, cfg) // cfg.SOLVER.ACCUMULATE
    yield from doubts(cfg, updates)
    yield from far_apart(material.metrics)


def _cards(found: Mapping[str, Measured], name: str) -> list[Card]:
    own, teacher, baseline = found[name], found.get(TEACHER), found.get(BASELINE)
    cards = [Card("top-1", f"{own.top1:.2f} %", name)]
    if baseline is not None:
        gain = f"{own.top1 - baseline.top1:+.2f} points"
        cards.append(Card("baseline's top-1", f"{baseline.top1:.2f} %", f"student {gain}"))
    if teacher is not None:
        gap = own.top1 - teacher.top1
        smaller = teacher.size.parameters / own.size.parameters
        faster = teacher.milliseconds[1] / own.milliseconds[1]
        cards += [
            Card("teacher's top-1", f"{teacher.top1:.2f} %", f"student {gap:+.2f} points"),
            Card("agreement", f"{own.said.agreement(teacher.said):.2f} %", "with the teacher"),
            Card("parameters", f"{own.size.parameters:,}", f"{smaller:.1f} times fewer"),
            Card("latency", f"{own.milliseconds[1]:.3g} ms", f"{faster:.1f} times faster"),
        ]
    return [*cards, Card("calibration error", f"{own.said.calibration_error():.3f}", "0 is best")]


def curve_sections(
    metrics: Sequence[Mapping[str, float]], found: Mapping[str, Measured]
) -> list[Section]:
    """Return the training curves with the teacher's accuracy; no section if there are none."""
    teacher = found.get(TEACHER)
    panels = classifier_panels(metrics, None if teacher is None else teacher.top1)
    pictures = [Picture(panel.title, panel_figure(panel, x="epoch")) for panel in panels]
    return [Section("Training", pictures=pictures)] if pictures else []


def main(arguments: Sequence[str] | None = None) -> Path:
    """Report as the arguments say; print and return the path of the HTML file."""
    given = report_parser().parse_args(arguments)
    with console_log():
        material = Material.of_run(given.run, given.device)
        if given.baseline is not None:
            material = material.beside(given.baseline)
        path = make_report(material).write(given.output or given.run)
    print(path)
    return path


if __name__ == "__main__":
    run_command(main)
