"""Grams of a classifier's stages beside its teacher's: ``pcka grams OUTPUT_DIR``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from classification.data import ImageSet, load_image_sets
from classification.models.taps import model_taps
from classification.report import STUDENT, Material, load_subjects
from classification.report_figures import TEACHER, Subject
from pcka.analysis.gram_pairs import GramPair, sample_grams
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.distill import numbered_stages
from pcka.engine.environment import choose_device
from pcka.engine.grams import SAMPLES, chosen_taps, grams_parser, write_grams
from pcka.engine.progress import console_log
from pcka.modes import evaluation_mode
from pcka.taps import FeatureTap

LEAST = 3  # images: for two, centered CKA is always 1


def sorted_sample(data: ImageSet, images: int) -> tuple[ImageSet, dict[str, int]]:
    """Return images sorted by class and evenly spaced in that order, and class -> their number.

    Args:
        data: in any order.
        images: how many, or all if there are fewer.

    Raises:
        ConfigError: fewer than 3 images.
    """
    count = min(images, len(data))
    if count < LEAST:
        raise ConfigError(f"--images: expected at least {LEAST}, got {count}")
    order = data.labels.argsort(stable=True)
    spaced = torch.linspace(0, len(data) - 1, count).long()
    sample = data.subset(order[spaced.to(order.device)])
    counts = sample.labels.bincount(minlength=len(data.classes)).tolist()
    return sample, {name: n for name, n in zip(data.classes, counts) if n}


@torch.no_grad()
def stage_grams(
    subjects: Mapping[str, Subject],
    taps: Mapping[str, tuple[str, str]],
    sample: ImageSet,
) -> dict[str, GramPair]:
    """Return the Grams of tapped features over all images of a sample.

    Args:
        subjects: student and teacher.
        taps: name -> (student path, teacher path).
        sample: on the models' device; its features must fit into memory.
    """
    student, teacher = (
        _features(subjects[who], {name: pair[side] for name, pair in taps.items()}, sample)
        for side, who in enumerate((STUDENT, TEACHER))
    )
    return {name: sample_grams(student[name], teacher[name]) for name in taps}


def _features(subject: Subject, paths: Mapping[str, str], sample: ImageSet) -> dict[str, Tensor]:
    parts = []
    with evaluation_mode(subject.model), FeatureTap(subject.model, paths) as tap:
        for images, *_ in sample.evaluation_batches():
            subject.model(subject.pixels(images))
            parts.append(tap.pop())
    return {name: torch.cat([part[name] for part in parts]) for name in paths}


def main(arguments: Sequence[str] | None = None) -> dict[str, GramPair]:
    """Draw as the arguments say; return the Grams."""
    given = grams_parser().parse_args(arguments)
    for option in ("patch_size", "channel"):
        if getattr(given, option) is not None:
            raise ConfigError(
                f"--{option.replace('_', '-')}: is for a detector's maps, but {given.run} is a "
                "classifier's run, whose Grams are between images; leave it out"
            )
    with console_log():
        material = Material.of_run(given.run, given.device)
        cfg = material.cfg
        if not cfg.TEACHER.NAME:
            raise ConfigError(
                f"{given.run}: its student learned without a teacher, so there is nothing to "
                "compare; give the folder of a run with TEACHER.NAME"
            )
        device = choose_device(cfg.DEVICE)
        train_set, data = (one.to(device) for one in load_image_sets(cfg))
        weights = given.weights or material.students[STUDENT]
        subjects, missing = load_subjects(cfg, {STUDENT: (cfg, weights)}, (train_set, data))
        if missing:
            raise ConfigError(f"TEACHER.WEIGHTS: {missing[0]}")
        student, teacher = (subjects[who].model for who in (STUDENT, TEACHER))
        taps = model_taps(student, teacher, cfg.DISTILL.TAPS)
        names = chosen_taps(given.taps, list(taps)) if given.taps else numbered_stages(taps)
        sample, classes = sorted_sample(data, given.images or SAMPLES)
        pairs = stage_grams(subjects, {name: taps[name] for name in names}, sample)
    write_grams(given.output or given.run / "grams", pairs, classes=classes)
    return pairs


if __name__ == "__main__":
    run_command(main)
