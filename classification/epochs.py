"""How a student's stages develop during training: ``pcka epochs OUTPUT_DIR``."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from classification.arguments import add_device
from classification.data import ImageSet, load_image_sets
from classification.evaluation import (
    CKA_BATCH_SIZE,
    CKA_IMAGES,
    from_raw_pixels,
    mixed_batches,
)
from classification.models.taps import model_taps
from classification.report import Material, load_subjects
from classification.report_figures import TEACHER, Subject
from pcka.analysis import cka_matrix
from pcka.analysis.layers import select_layers
from pcka.checkpoint import load_weights
from pcka.engine.arguments import command_parser, positive
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.distill import numbered_stages
from pcka.engine.environment import choose_device
from pcka.engine.epoch_cka import EpochCKA
from pcka.engine.progress import console_log
from pcka.engine.run_folder import kept_students

logger = logging.getLogger("pcka")

LAST, MOST_ALIKE = "last student", "most alike stage of the teacher"
LEAST = 2  # epochs
LAYER_IMAGES = 4  # to find out which layers there are


class Compared(NamedTuple):
    """What is compared in every epoch.

    Attributes:
        layers: name -> path in the student.
        stages: name -> paths in the teacher, of which the most similar counts; {}: no teacher.
    """

    layers: Mapping[str, str]
    stages: Mapping[str, Sequence[str]]


class _Alike(NamedTuple):
    """Similarities of one student.

    Attributes:
        values: CKA of its layers with the same layers of the last student and, if there is one,
            with the teacher.
        stages: paths of the teacher's stages that the second values refer to.
    """

    values: list[list[float]]
    stages: list[str]


class _Beside(nn.ModuleDict):
    """Models that receive the same images."""

    def forward(self, images: Tensor) -> None:
        for model in self.values():
            model(images)


def cka_over_epochs(
    material: Material,
    kept: Mapping[int, Path],
    layers: Sequence[str] | None = None,
    images: int = CKA_IMAGES,
) -> EpochCKA:
    """Compute the CKA of a run's students with the last one, and with the teacher.

    Minibatch CKA (:class:`pcka.analysis.MinibatchCKA`) on evenly spaced evaluation images. A stage
    is compared with the teacher's stage that a loss would compare it with; each of ``layers`` with
    all stages, of which the most similar counts.

    Args:
        material: of the run; a teacher whose weights are missing is left out.
        kept: epoch -> weights, two or more.
        layers: paths and patterns of the student; None: its stages.
        images: their number.

    Raises:
        ConfigError: layers that the student does not have, weights that are not its own, or fewer
            than four images.
    """
    cfg, device = material.cfg, choose_device(material.cfg.DEVICE)
    train_set, data = (one.to(device) for one in load_image_sets(cfg))
    last = cfg, kept[max(kept)]
    subjects, missing = load_subjects(cfg, {LAST: last}, (train_set, data))
    for text in missing:
        logger.warning(text)
    student, teacher = subjects[LAST], subjects.get(TEACHER)
    alike = []
    try:
        compared = _compared(student, teacher, layers, data)
        early = student._replace(model=copy.deepcopy(student.model))
        for path in kept.values():
            load_weights(early.model, path)
            batches = mixed_batches(data, images, CKA_BATCH_SIZE)
            alike.append(_alike(early, student, teacher, compared, batches))
    except ValueError as error:  # about the layers, or a damaged file
        raise ConfigError(f"{error}") from error
    names = (LAST, TEACHER if layers is None else MOST_ALIKE)[: 1 + bool(compared.stages)]
    values = torch.tensor([epoch.values for epoch in alike], dtype=torch.float64).permute(1, 2, 0)
    partners = {MOST_ALIKE: list(zip(*(epoch.stages for epoch in alike)))}
    return EpochCKA(
        tuple(kept),
        tuple(compared.layers),
        dict(zip(names, values)),
        partners if MOST_ALIKE in names else {},
    )


def _compared(
    student: Subject, teacher: Subject | None, layers: Sequence[str] | None, data: ImageSet
) -> Compared:
    others = student if teacher is None else teacher
    if layers is None:
        taps = model_taps(student.model, others.model, [])
        stages = numbered_stages(taps)
        found = {name: taps[name][0] for name in stages}
        theirs: dict[str, Sequence[str]] = {name: [taps[name][1]] for name in stages}
    else:
        images = next(iter(data.evaluation_batches(LAYER_IMAGES))).images
        paths = select_layers(student.model, layers, student.pixels(images))
        found = {path: path for path in paths}
        theirs = {path: others.model.stage_names for path in paths}
    if not found:
        raise ConfigError("--layers: no stages of this student are known; name layers")
    return Compared(found, {} if teacher is None else theirs)


def _alike(
    early: Subject,
    last: Subject,
    teacher: Subject | None,
    compared: Compared,
    batches: Iterator[Tensor],
) -> _Alike:
    beside = {"last": from_raw_pixels(last.pixels, last.model)}
    if teacher is not None:
        beside["teacher"] = from_raw_pixels(teacher.pixels, teacher.model)
    own = [f"model.{path}" for path in compared.layers.values()]
    stages = list(dict.fromkeys(chain(*compared.stages.values())))
    columns = [f"last.{path}" for path in own] + [f"teacher.model.{path}" for path in stages]
    model = from_raw_pixels(early.pixels, early.model)
    values = cka_matrix(model, _Beside(beside), batches, own, columns, shared=False).values
    with_last, with_teacher = values.split([len(own), len(stages)], dim=1)
    alike = _Alike([with_last.diagonal().tolist()], [])
    if compared.stages:
        best = [
            max((row[stages.index(path)], path) for path in paths)
            for row, paths in zip(with_teacher.tolist(), compared.stages.values())
        ]
        alike.values.append([value for value, _ in best])
        alike.stages.extend(path for _, path in best)
    return alike


def main(arguments: Sequence[str] | None = None) -> EpochCKA:
    """Compare as the arguments say; write the picture and the values, and return the values."""
    given = _parser().parse_args(arguments)
    with console_log():
        material = Material.of_run(given.run, given.device)
        kept = kept_students(given.run)
        if len(kept) < LEAST:
            raise ConfigError(
                f"KEEP_EVERY: {given.run} holds the students of {len(kept)} epochs, at least "
                f"{LEAST} are needed; train with KEEP_EVERY 1, or another interval"
            )
        found = cka_over_epochs(material, kept, given.layers, given.images)
    path = given.output or given.run / "epochs"
    picture, values = (Path(f"{path}{suffix}") for suffix in (".png", ".csv"))
    found.plot(picture)
    found.write_csv(values)
    for name, partners in found.partners.items():
        for layer, of_epochs, value in zip(found.layers, partners, found.values[name][:, -1]):
            print(f"{layer}: {name} at the end: {of_epochs[-1]}, CKA {value:.3f}")
    print(f"CKA of {len(found.layers)} layers in {len(kept)} epochs: {picture}, {values}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "CKA of the layers of a classifier's run, in each kept epoch (KEEP_EVERY), with the last "
        "student and with the teacher: a picture (PNG) and a table (CSV).",
        "pcka epochs output/run",
        "pcka epochs output/run --layers 'layer?.?'",
    )
    parser.prog = "pcka epochs"
    parser.add_argument("run", type=Path, metavar="RUN", help="OUTPUT_DIR of the run")
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="L",
        help="paths or patterns of the student, compared with the most similar teacher stage "
        "(default: the stages, each with the teacher's)",
    )
    parser.add_argument(
        "--images",
        type=positive,
        default=CKA_IMAGES,
        metavar="N",
        help="evenly spaced (%(default)s)",
    )
    parser.add_argument(
        "--output",
        default="",
        metavar="PATH",
        help="path of the files, without suffix (default: epochs in the run's folder)",
    )
    add_device(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
