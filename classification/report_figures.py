"""The measurements of classifiers for a report, and the sections that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from classification.data import ImageSet
from classification.evaluation import percentages, predict, stage_matrix
from classification.models import Classifier
from pcka.analysis import CKATable
from pcka.analysis.grams import MIN_SAMPLES
from pcka.analysis.predictions import BINS, Predictions
from pcka.engine.curves import TEACHER_COLOUR, method_style
from pcka.engine.model_cost import ModelSize, latencies, model_size
from pcka.engine.report import Picture, Section, Table
from pcka.engine.report_pictures import (
    Style,
    class_figure,
    confusion_figure,
    reliability_figure,
)
from pcka.modes import evaluation_mode

TEACHER = "teacher"  # name of the model that the others are compared with
LATENCY_BATCHES = (1, 64)
TRAINING_IMAGES = 2048  # predicted, at most
WHOLE_CONFUSION = 200  # classes, at most, for the JSON to hold the whole matrix
MOST_PAIRS = 30  # of confused classes


class Subject(NamedTuple):
    """A model of a report, on the device that it is measured on.

    Attributes:
        model: with its stages.
        pixels: its pixel normalisation.
        file: its weights file; None if it has none.
    """

    model: Classifier
    pixels: nn.Module
    file: Path | None


@dataclass(frozen=True, eq=False)
class Measured:
    """The figures of one model.

    Attributes:
        said: predictions on the evaluation images.
        seen: predictions on training images.
        size: of the model.
        milliseconds: batch size -> median latency.
        file_bytes: of its weights file; None if there is none.
    """

    said: Predictions
    seen: Predictions
    size: ModelSize
    milliseconds: dict[int, float]
    file_bytes: int | None

    @property
    def top1(self) -> float:
        """Percentage of evaluation images classified correctly."""
        return _percentages(self.said)["top1"]

    @property
    def top5(self) -> float | None:
        """Percentage whose label is among the top five; None with five classes or fewer."""
        return _percentages(self.said).get("top5")

    @property
    def training_top1(self) -> float:
        """Percentage of training images classified correctly."""
        return _percentages(self.seen)["top1"]

    def agreement(self, found: Mapping[str, Measured]) -> float | None:
        """Percentage of evaluation images predicted like the teacher; None for the teacher."""
        teacher = found.get(TEACHER)
        return None if teacher is None or teacher is self else self.said.agreement(teacher.said)


def _percentages(said: Predictions) -> dict[str, float]:
    return percentages(said.hits(), len(said), said.classes)


@torch.no_grad()
def measure(
    subjects: Mapping[str, Subject], train_set: ImageSet, evaluation_set: ImageSet
) -> dict[str, Measured]:
    """Measure every model, in one pass each over the evaluation images.

    Args:
        subjects: by name.
        train_set: at most :data:`TRAINING_IMAGES` of it are predicted, evenly spaced and not
            augmented.
        evaluation_set: on the models' device.
    """
    spaced = torch.linspace(0, len(train_set) - 1, min(TRAINING_IMAGES, len(train_set))).long()
    seen = train_set.subset(spaced)
    times: dict[str, dict[int, float]] = {name: {} for name in subjects}
    for size in LATENCY_BATCHES:
        for name, value in _latencies(subjects, evaluation_set, size).items():
            times[name][size] = value
    found = {}
    for name, (model, pixels, file) in subjects.items():
        (image,) = islice(evaluation_set.evaluation_batches(1), 1)
        found[name] = Measured(
            predict(model, pixels, evaluation_set).cpu(),
            predict(model, pixels, seen).cpu(),
            model_size(model, pixels(image.images)),
            times[name],
            file.stat().st_size if file is not None and file.is_file() else None,
        )
    return found


def _latencies(
    subjects: Mapping[str, Subject], data: ImageSet, batch_size: int
) -> dict[str, float]:
    """Milliseconds of a forward pass on normalised images."""
    (batch,) = islice(data.evaluation_batches(min(batch_size, len(data))), 1)
    images = batch.images.repeat(-(-batch_size // len(batch.images)), 1, 1, 1)[:batch_size]
    calls = {name: partial(s.model, s.pixels(images)) for name, s in subjects.items()}
    with evaluation_mode(*(subject.model for subject in subjects.values())):
        return latencies(calls, data.device)


def stage_tables(subjects: Mapping[str, Subject], data: ImageSet) -> dict[str, CKATable]:
    """Name -> CKA of the model's stages (rows) with the teacher's, if both have stages."""
    teacher = subjects.get(TEACHER)
    if teacher is None or not teacher.model.stage_names or len(data) < MIN_SAMPLES:
        return {}
    return {
        name: stage_matrix((s.pixels, s.model), (teacher.pixels, teacher.model), data)
        for name, s in subjects.items()
        if name != TEACHER and s.model.stage_names
    }


def styles_of(names: Sequence[str]) -> dict[str, Style]:
    """Return each model's colour and dash: the teacher's own, the others' as in all figures."""
    others = [name for name in names if name != TEACHER]
    return {TEACHER: (TEACHER_COLOUR, "--")} | {
        name: method_style(index) for index, name in enumerate(others)
    }


def as_data(found: Mapping[str, Measured], classes: Sequence[str]) -> dict[str, Any]:
    """Return the entries of ``report.json`` on each model."""
    return {name: _as_data(of_model, found, classes) for name, of_model in found.items()}


def _as_data(own: Measured, found: Mapping[str, Measured], classes: Sequence[str]) -> dict:
    said = own.said
    confusion = said.confusion().tolist() if len(classes) <= WHOLE_CONFUSION else None
    return {
        **_percentages(said),
        "training_top1": own.training_top1,
        "training_images": len(own.seen),
        "agreement_with_teacher": own.agreement(found),
        "calibration_error": said.calibration_error(),
        "reliability": [b._asdict() for b in said.reliability()],
        "by_class": dict(zip(classes, said.class_accuracy())),
        "confusion": confusion,
        "parameters": own.size.parameters,
        "state_bytes": own.size.state_bytes,
        "macs": own.size.macs,
        "uncounted_in_macs": list(own.size.uncounted),
        "file_bytes": own.file_bytes,
        "latency_ms": own.milliseconds,
    }


def overview(found: Mapping[str, Measured], device: str, images: int, text: str = "") -> Section:
    """The models side by side: accuracy, size and speed."""
    seen = len(next(iter(found.values())).seen)
    accuracy, cost = [], []
    for name, own in found.items():
        shares = own.top1, own.top5, own.training_top1
        error, agreed = f"{own.said.calibration_error():.3f}", own.agreement(found)
        accuracy.append([name, *(as_text(share) for share in shares), error, as_text(agreed)])
        times = (f"{own.milliseconds[size]:.3g}" for size in LATENCY_BATCHES)
        sizes = as_text(own.size.macs, 1e6), as_text(own.file_bytes, 2**20)
        cost.append([name, f"{own.size.parameters:,}", *sizes, *times])
    batches = [f"ms, batch {size}" for size in LATENCY_BATCHES]
    uncounted = sorted({op for own in found.values() for op in own.size.uncounted})
    missing = f" Not counted: {', '.join(uncounted)}." if uncounted else ""
    return Section(
        "Models",
        text,
        tables=[
            Table(
                ["", "top-1 (%)", "top-5 (%)", "training top-1 (%)", "ECE", "as the teacher (%)"],
                accuracy,
                f"On {images:,} evaluation images; training top-1 on {seen:,} training images "
                "without augmentation. ECE: expected calibration error. As the teacher: both "
                "predict the same class.",
            ),
            Table(
                ["", "parameters", "MACs (millions)", "file (MiB)", *batches],
                cost,
                f"MACs of one image.{missing} Latency of the forward pass on this machine "
                f"({device}), float32: median after warm-up, models interleaved.",
            ),
        ],
    )


def class_section(
    found: Mapping[str, Measured], classes: Sequence[str], *, confusions: bool = True
) -> Section:
    """Accuracy by class, and which classes are confused."""
    by_class = {name: own.said.class_accuracy() for name, own in found.items()}
    counted = {name: own.said.confusion() for name, own in found.items()}
    images = next(iter(counted.values())).sum(1).tolist()
    rows = [
        [name, str(images[i]), *(as_text(of_model[i], digits=1) for of_model in by_class.values())]
        for i, name in enumerate(classes)
    ]
    figure = class_figure(by_class, classes, styles_of(list(found)))
    pictures = [Picture("Accuracy by class", figure)]
    if confusions:
        pictures += [
            Picture(f"Confusion: {name}", confusion_figure(confusion.numpy(), classes))
            for name, confusion in counted.items()
        ]
    every = Table(["class", "images", *(f"{name} (%)" for name in found)], rows)
    errors = {
        f"Most frequent errors: {name}": _errors(confusion, classes)
        for name, confusion in counted.items()
    }
    folded: dict[str, Table | str] = {"Accuracy of every class": every, **errors}
    return Section("Classes", pictures=pictures, folded=folded)


def _errors(confusion: torch.Tensor, classes: Sequence[str]) -> Table:
    """The pairs of classes that are confused most often."""
    wrong = confusion - torch.diag(confusion.diagonal())
    values, places = wrong.flatten().topk(min(MOST_PAIRS, wrong.numel()))
    pairs = [(value, *divmod(place, len(classes))) for value, place in zip(*_lists(values, places))]
    rows = [[classes[i], classes[j], str(count)] for count, i, j in pairs if count]
    return Table(["label", "predicted", "images"], rows)


def _lists(*tensors: torch.Tensor) -> list[list[int]]:
    return [tensor.tolist() for tensor in tensors]


def as_text(value: float | None, unit: float = 1.0, digits: int = 2) -> str:
    """Format a figure in a unit; empty if there is none."""
    return "" if value is None else f"{value / unit:,.{digits}f}"


def calibration_section(found: Mapping[str, Measured]) -> Section:
    """How well confidence matches accuracy."""
    bins = {name: own.said.reliability() for name, own in found.items()}
    return Section(
        "Calibration",
        f"Accuracy over confidence (greatest probability) in {BINS} intervals, and the share of "
        "images in each. Below the diagonal, a model is overconfident.",
        pictures=[Picture("Reliability", reliability_figure(bins, styles_of(list(found))))],
    )


def _pairing(name: str, own: int, theirs: int) -> str:
    """Say which stages losses and curves compare if the models have different numbers of them."""
    if own == theirs:
        return ""
    first = max(own - theirs, 0)
    return (
        f" The {name} has {own} stages and the teacher {theirs}. Losses and curves count from the "
        f"last ones: the {name}'s stage{first} is compared with the teacher's "
        f"stage{first + theirs - own}, and so on."
    )


def stage_section(tables: Mapping[str, CKATable]) -> Section:
    """The CKA of the stages with the teacher's."""
    return Section(
        "Stages",
        "Minibatch CKA (unbiased) of every stage with every stage of the teacher, on up to 512 "
        "evaluation images; stage0 is the stem."
        + "".join(_pairing(name, *table.values.shape) for name, table in tables.items()),
        pictures=[
            Picture(f"CKA: {name}", table.figure(name, TEACHER)) for name, table in tables.items()
        ],
    )
