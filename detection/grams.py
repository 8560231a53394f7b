"""Gram matrices of a detector's levels next to its teacher's: ``pcka grams OUTPUT_DIR``."""

from __future__ import annotations

import detection

# isort: split

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import build_model

import detection.meta_arch  # noqa: F401  (registers itself)
from detection.checkpoint import load_weights
from detection.config import DISTILLED, load_config
from detection.data import register_datasets
from detection.data.mapper import make_mapper
from detection.data.targets import first_test_set
from detection.levels import patch_for
from detection.meta_arch import DistilledDetector
from detection.preflight import usable_device
from detection.settings import CONFIG
from pcka.analysis.gram_pairs import GramPair, patch_grams
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.grams import chosen_taps, grams_parser, write_grams
from pcka.engine.progress import console_log
from pcka.files import load_file
from pcka.losses import PCKA, Loss, Outputs
from pcka.losses.numerics import CONSTANT_UP_TO
from pcka.modes import evaluation_mode
from pcka.taps import FeatureTap

logger = logging.getLogger("pcka")

WEIGHTS = "model_final.pth"
OF_PARTS = ("adapters", "losses")


class Settings(NamedTuple):
    """How a level is compared: arguments of :func:`pcka.analysis.patch_grams`."""

    patch_size: int | tuple[int, int]
    group_by: str = "channel"
    center: bool = True


class LevelGrams(NamedTuple):
    """Grams by level, or by level and image, and the corresponding padded images."""

    pairs: dict[str, GramPair]
    images: dict[str, np.ndarray]


@torch.no_grad()
def level_grams(
    cfg: CfgNode,
    weights: Path,
    *,
    levels: Sequence[str] | None = None,
    images: int = 1,
    patch_size: int | None = None,
    channel: int | None = None,
) -> LevelGrams:
    """Return the Grams of a distilled detector's levels, on the first images of the test set.

    The maps are those that PCKA sees, the student's after its adapters; the patches, grouping and
    centering are those of the loss. In a run without PCKA, the patches are as large as leaves 16 of
    them. ``BACKGROUND`` is not applied: whole maps are compared.

    Args:
        cfg: the run's configuration, with its data sets registered.
        weights: a checkpoint of the run.
        levels: levels to compare; None: those of PCKA, or all that the run's losses compare at one
            shape.
        images: number of images, each compared separately.
        patch_size: patch size for all levels.
        channel: compare only this channel.

    Raises:
        ConfigError: there is no test set, the run has no teacher or its weights were not kept, the
            weights are not the run's own, or levels cannot be compared.
    """
    name = first_test_set(cfg)
    model = _distilled(cfg, weights)
    losses = cast("list[Loss]", list(model.distiller.losses))
    loss = next((one for one in losses if isinstance(one, PCKA)), None)
    compared = [loss] if loss else [one for one in losses if one.same_shape]
    usual = list(dict.fromkeys(tap for one in compared for tap in one.taps))
    chosen = chosen_taps(levels, list(model.distiller.teacher_paths)) if levels else usual
    if not chosen:
        raise ConfigError(
            f"DISTILL.METHODS: {', '.join(cfg.DISTILL.METHODS)} compares no maps of the same "
            "shape, so there are no Grams; give the folder of a run with PCKA"
        )
    loader = build_detection_test_loader(cfg, name, mapper=make_mapper(cfg, training=False))
    found = LevelGrams({}, {})
    for number, (batch, _) in enumerate(zip(loader, range(images)), 1):
        student, teacher, canvas = _maps(model, batch)
        image = _on_canvas(batch[0]["image"], canvas, cfg.INPUT.FORMAT)
        for level in chosen:
            own, other = student.feature(level), teacher.feature(level)
            settings = _settings(loss, level, min(own.shape[2:]), patch_size)
            pair = _compared(level, own, other, settings, channel)
            title = level if images == 1 else f"{level} of image {number}"
            if pair is not None:
                found.pairs[title], found.images[title] = pair, image
    if not found.pairs:
        raise ConfigError(
            f"--patch-size: {', '.join(chosen)} has too few patches for a meaningful "
            "Gram; give a smaller patch"
        )
    return found


def _distilled(cfg: CfgNode, weights: Path) -> DistilledDetector:
    """Load the run's student, teacher, adapters and losses."""
    wanted = cfg.DISTILL.TEACHER
    if cfg.MODEL.META_ARCHITECTURE != DISTILLED or not cfg.DISTILL.METHODS:
        raise ConfigError(
            f"{cfg.OUTPUT_DIR}: its detector learned without a teacher, so there is nothing to "
            "compare; give the folder of a run with DISTILL.METHODS"
        )
    if wanted.RANDOM_WEIGHTS and not wanted.WEIGHTS:
        raise ConfigError(
            "DISTILL.TEACHER.WEIGHTS: the teacher of this run had random weights, which are not "
            "kept; give the folder of a run with a teacher's file"
        )
    model = build_model(cfg)
    load_weights(model.student, str(weights))
    content: Any = load_file(weights)
    for name in OF_PARTS:
        part = getattr(model.distiller, name)
        try:
            part.load_state_dict(content.get(name, {}))
        except RuntimeError as error:
            raise ConfigError(
                f"{weights}: holds no {name} of this configuration, needed to compare its "
                "levels; give a checkpoint that the run itself wrote"
            ) from error
    return model


def _maps(
    model: DistilledDetector, batch: list[dict[str, Any]]
) -> tuple[Outputs, Outputs, tuple[int, int]]:
    """Return both models' maps as the losses see them, and the size of the padded images."""
    with (
        evaluation_mode(model.student),
        FeatureTap(model.student, {"canvas": "backbone:input"}) as tap,
    ):
        student = model.distiller.observe_student(batch)
        height, width = tap.pop()["canvas"].shape[-2:]
    images = [entry["image"].to(model.device) for entry in batch]
    teacher = model.distiller.observe_teacher(images, (height, width))
    student, teacher = model.distiller.at_one_shape(student, teacher)
    assert teacher is not None  # the losses need it
    return student, teacher, (height, width)


def _settings(loss: PCKA | None, level: str, side: int, patch_size: int | None) -> Settings:
    """The loss's settings if it compares the level, else defaults."""
    if loss is None or level not in loss.taps:
        return Settings(patch_size or patch_for(side, 1))
    own = loss.patch_sizes[loss.taps.index(level)]
    return Settings(patch_size or own, loss.group_by, loss.center)


def _compared(
    level: str, own: torch.Tensor, other: torch.Tensor, settings: Settings, channel: int | None
) -> GramPair | None:
    """Return the Grams of a level; None, with a warning, if it has too few patches."""
    if channel is not None:
        if not 0 <= channel < own.shape[1]:
            raise ConfigError(
                f"--channel: expected 0 to {own.shape[1] - 1} for the level {level}, got {channel}"
            )
        own, other = own[:, channel : channel + 1], other[:, channel : channel + 1]
    try:
        pair = patch_grams(own, other.to(own.dtype), **settings._asdict())
    except ValueError as error:
        raise ConfigError(f"--taps: {level}: {error}") from error
    if len(pair.student) > CONSTANT_UP_TO[settings.center]:
        return pair
    logger.warning(
        "%s is left out: %d patch(es) of size %s carry no signal; give a smaller --patch-size",
        level, len(pair.student), settings.patch_size,
    )  # fmt: skip
    return None


def _on_canvas(image: torch.Tensor, canvas: Sequence[int], channels: str) -> np.ndarray:
    """``(3, H, W)`` from the loader -> ``(*canvas, 3)`` uint8, RGB, white beyond the image."""
    shown = np.full((*canvas, 3), 255, dtype=np.uint8)
    pixels = convert_image_to_rgb(image.permute(1, 2, 0).cpu(), channels)
    shown[: pixels.shape[0], : pixels.shape[1]] = np.clip(pixels, 0, 255)
    return shown


def main(arguments: Sequence[str] | None = None) -> Mapping[str, GramPair]:
    """Draw the Grams given by the arguments, and return them."""
    given = grams_parser().parse_args(arguments)
    weights = given.weights or given.run / WEIGHTS
    for path in (given.run / CONFIG, weights):
        if not path.is_file():
            raise ConfigError(
                f"{given.run}: expected the folder of a detector's run, found no {path.name}; "
                "give the OUTPUT_DIR of a finished run, or --weights"
            )
    cfg = load_config(str(given.run / CONFIG), [])
    device = {"": cfg.MODEL.DEVICE, "auto": "cuda"}.get(given.device, given.device)
    cfg.MODEL.DEVICE = usable_device(device)
    register_datasets(cfg, training=False)
    with console_log():
        pairs, images = level_grams(
            cfg,
            weights,
            levels=given.taps,
            images=given.images or 1,
            patch_size=given.patch_size,
            channel=given.channel,
        )
    write_grams(given.output or given.run / "grams", pairs, images)
    return pairs


if __name__ == "__main__":
    run_command(main)
