"""Settings for two models and a folder of images, without a configuration file.

The proposal depends only on the images, the models, the given keys and, for DATA.WORKERS, the
number of CPU cores: the same command proposes the same settings, and ``--resume`` continues with
them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from torch import Tensor, nn

from classification.batch_norm import USUAL_MOMENTUM, running_norms
from classification.config import load_config
from classification.data import Source
from classification.data.forms import FORMS, forms_in
from classification.data.image_files import FileSource, cut_centre
from classification.data.source import make_source
from classification.model_pixels import (
    learned_with,
    likeliest_statistics,
    measured_statistics,
    stated_statistics,
)
from classification.models import (
    has_own_weights,
    load_classifier,
    named_model,
    settings_of,
    without_weights,
)
from classification.models.stage_search import check_size
from classification.models.torchvision_zoo import PREFIX, published
from classification.teacher import check_teacher
from pcka.engine.config import pairs_of
from pcka.engine.environment import choose_device

DEFAULT_METHOD = "kd_fcka"  # what docs/results.md recommends
BASELINE = "ce"  # without a teacher

SIDES = (32, 48, 64, 96, 128, 160, 192, 224)  # of the images, pixels
LARGER_CENTRE = 256 / 224  # shorter side over the evaluated centre, when streaming
MOST_WORKERS = 16
BATCH_SIZES = ((500, 16), (5_000, 32), (20_000, 64), (200_000, 128))  # (images below, batch size)
LARGEST_BATCH = 256
ADAMW_LR = 1e-3
SHARE_HELD_OUT, MOST_HELD_OUT = 0.2, 10_000
LOOKED_AT = 256  # images sampled for sizes and pixel statistics


class Proposal(NamedTuple):
    """The result of :func:`propose`.

    Attributes:
        settings: dotted key -> value, as a configuration file would hold them.
        notes: what they are and where they come from, one line each.
    """

    settings: dict[str, object]
    notes: list[str]


@dataclass
class _Draft:
    """A proposal in the making.

    Attributes:
        cfg: the defaults with the given values and those proposed so far.
        given: the keys of the command line, which are left unchanged.
    """

    cfg: CfgNode
    given: AbstractSet[str]
    settings: dict[str, object]
    notes: list[str] = field(default_factory=list)

    def suggest(self, key: str, value: Any) -> Any:
        """Set a key unless it is given; return its value."""
        section, _, name = key.rpartition(".")
        node = self.cfg[section] if section else self.cfg
        if key not in self.given:
            self.settings[key] = node[name] = value
        return node[name]

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """STUDENT and, if there is one, TEACHER -> the untrained model."""
        sections = {role: self.cfg[role] for role in ("STUDENT", "TEACHER")}
        return {
            role: named_model(section.NAME, 2, role=role.lower(), **without_weights(section))
            for role, section in sections.items()
            if section.NAME
        }


def propose(
    folder: str | Path,
    student: str,
    *,
    teacher: str = "",
    weights: str = "",
    method: str = "",
    overrides: Sequence[str] = (),
) -> Proposal:
    """Return settings that suit a folder of images and two models.

    Args:
        folder: with ``train/<class>/*`` and ``test/<class>/*`` (or ``val``), or another of
            :data:`FORMS`. Without a test part, or with ``<class>/*`` alone, some of the training
            images are held out.
        student: name of a model.
        teacher: likewise; "" trains the student without one.
        weights: the teacher's checkpoint; "" trains it first, unless it comes with weights.
        method: the method to train with; also part of the run folder's name.
        overrides: ``KEY VALUE`` pairs, which the proposal leaves unchanged.

    Raises:
        ConfigError: keys, names or data that a run would refuse.
    """
    run_name = _file_name(Path(folder).resolve().name, student, method)
    names: dict[str, object] = {
        "DATA.NAME": "folder",  # other forms are detected below
        "DATA.ROOT": str(folder),
        "STUDENT.NAME": student,
        "TEACHER.NAME": teacher,
        "TEACHER.WEIGHTS": weights,
        "OUTPUT_DIR": f"output/{run_name}",
        "CHANNELS_LAST": True,
        "AUTOCAST": "auto",
    }
    cfg = load_config(names, overrides, method)
    cfg.defrost()
    draft = _Draft(cfg, {key for key, _ in pairs_of(overrides)}, names)
    draft.suggest("DATA.NAME", next(forms_in(cfg.DATA, "train"), "folder"))
    source = make_source(cfg.DATA, "train")
    if cfg.TEACHER.NAME:
        draft.suggest("TEACHER.TRAIN", _has_to_learn(cfg.TEACHER, len(source.classes)))
        check_teacher(cfg)
    trained, evaluated = _divide(draft, source)
    _size(draft, source, trained + evaluated)
    _normalize(draft, source)
    _schedule(draft, trained)
    return Proposal(draft.settings, draft.notes)


def _has_to_learn(teacher: CfgNode, classes: int) -> bool:
    """Whether a teacher still lacks weights for these classes."""
    if teacher.WEIGHTS:
        return False
    if not has_own_weights(teacher):
        return True
    if teacher.NAME.startswith(PREFIX):
        return len(published(teacher.NAME.removeprefix(PREFIX)).meta["categories"]) != classes
    if not teacher.NAME.startswith("timm/"):  # a transformers folder knows its classes
        return False
    model: Any = named_model(teacher.NAME, 2, role="teacher", **without_weights(teacher))
    return model.pretrained_cfg["num_classes"] != classes


def _file_name(*words: str) -> str:
    return "-".join(re.sub(r"[^\w.]+", "-", word).strip("-.") for word in words if word)


def _divide(draft: _Draft, source: Source) -> tuple[int, int]:
    """Choose the training and evaluation images; return their numbers."""
    data, images = draft.cfg.DATA, len(source.labels)
    text = f"{images:,} images of {len(source.classes)} classes"
    text += f", DATA.NAME {data.NAME}" * (data.NAME != "folder")
    if not data.TEST_PART and data.NAME in FORMS and data.NAME not in forms_in(data, "test"):
        share = min(int(images * SHARE_HELD_OUT), MOST_HELD_OUT)
        held_out = draft.suggest("DATA.HOLDOUT", share)
        text += f"; without a test or val part, {held_out:,} of them are held out for evaluation"
        text += " (DATA.HOLDOUT)"
    draft.notes.append(f"data: {text}")
    evaluated = data.HOLDOUT or len(make_source(data, "test").labels)
    return data.TRAIN_IMAGES or images - data.HOLDOUT, evaluated


def _size(draft: _Draft, source: Source, images: int) -> None:
    """Choose the images' size, and whether they stay in memory."""
    data = draft.cfg.DATA
    why = ""
    if (learned := learned_with(draft.cfg.TEACHER).get("DATA.IMAGE_SIZE")) is not None:
        wanted, why = int(str(learned)), "what the teacher was trained with"
    elif isinstance(source, FileSource) and (median := _shorter_side(source)) is not None:
        wanted = max((side for side in SIDES if side <= 1.2 * median), default=SIDES[0])
        why = f"the files' shorter sides have a median of {median:g}"
    else:
        wanted = data.IMAGE_SIZE
    side = _accepted(draft.models, wanted)
    if draft.suggest("DATA.IMAGE_SIZE", side) == side != wanted:
        why = "a model accepts no other"
    side = data.IMAGE_SIZE
    draft.suggest("DATA.CROP_PADDING", side // 8)
    gigabytes = images * 3 * side**2 / 1e9
    files = isinstance(source, FileSource)
    if draft.suggest("DATA.STREAM", files and gigabytes > data.MEMORY_GB):
        draft.suggest("DATA.RESIZE", round(side * LARGER_CENTRE))
        draft.suggest("DATA.WORKERS", min(os.cpu_count() or 1, MOST_WORKERS))
    place = "streamed from their files" if data.STREAM else "in memory"
    about = f" ({why})" if why and "DATA.IMAGE_SIZE" not in draft.given else ""
    mirrored = "mirrored at random (DATA.FLIP False: never)" if data.FLIP else "never mirrored"
    draft.notes.append(f"images: DATA.IMAGE_SIZE {side}{about}, {place}, {mirrored}")


def _shorter_side(source: FileSource) -> float | None:
    """Return the median of the files' shorter sides, pixels; None if no file can be opened."""
    sides = []
    for position in _spaced(len(source.labels), LOOKED_AT):
        try:
            with Image.open(source.files.content(position)) as image:
                sides.append(min(image.size))
        except OSError:  # the run reports the file when decoding it
            continue
    return float(np.median(sides)) if sides else None


def _accepted(models: Mapping[str, nn.Module], wanted: int) -> int:
    """Return a side that all models accept: the wanted one, or else a common fixed size."""
    for side in (wanted, 224, 256, 32):
        try:
            for model in models.values():
                check_size(model, side)
        except ValueError:
            continue
        return side
    return wanted  # the run reports which model refuses it


def _normalize(draft: _Draft, source: Source) -> None:
    """Choose the pixel statistics of both models."""
    chosen = _spaced(len(source.labels), LOOKED_AT)
    pixels = _pixels(source, chosen, draft.cfg.DATA.IMAGE_SIZE)
    measured = measured_statistics(pixels)
    told = []
    for role in draft.models:
        section = draft.cfg[role]
        if draft.given & {f"{role}.PIXEL_MEAN", f"{role}.PIXEL_STD"}:
            continue
        found = None
        if section.WEIGHTS or has_own_weights(section):
            found = stated_statistics(section)
        if section.WEIGHTS and not learned_with(section):
            # A library states the statistics of its own weights, not of this file.
            candidates = [one for one in (found, measured) if one is not None]
            labels = torch.from_numpy(source.labels)[chosen]
            device = choose_device(draft.cfg.DEVICE)
            given = {"role": role.lower(), **settings_of(section)}
            model = load_classifier(section.NAME, section.WEIGHTS, len(source.classes), **given)
            found = likeliest_statistics(
                model.to(device), pixels.to(device), labels.to(device), candidates
            )
        found = found or measured
        draft.suggest(f"{role}.PIXEL_MEAN", list(found.mean))
        draft.suggest(f"{role}.PIXEL_STD", list(found.std))
        told.append(f"{role.lower()}: {found.source}")
    if told:
        draft.notes.append(f"pixel statistics: {'; '.join(told)}")


def _pixels(source: Source, chosen: list[int], side: int) -> Tensor:
    """Return the chosen training images, (M, 3, side, side) uint8."""
    if not isinstance(source, FileSource):
        return source.read(np.array(chosen))
    return torch.stack([cut_centre(source.files.open(one), side, side) for one in chosen])


def _spaced(images: int, count: int) -> list[int]:
    """Return evenly spaced positions, so that all classes of a sorted set are among them."""
    return np.linspace(0, images - 1, min(count, images)).astype(int).tolist()


def _schedule(draft: _Draft, trained: int) -> None:
    """Choose batch size, optimizer, learning rate and epochs from image count and models."""
    solver = draft.cfg.SOLVER
    batch = draft.suggest("SOLVER.BATCH_SIZE", min(batch_size(trained), max(trained, 1)))
    without = [role for role in _trained(draft) if not running_norms(draft.models[role])]
    if without and not draft.cfg.DISTILL.DOT_DELTA:  # a form of SGD
        draft.suggest("SOLVER.OPTIMIZER", "adamw")
    optimizer = _adamw(draft, without) if solver.OPTIMIZER == "adamw" else _sgd(draft, batch)
    epochs = draft.suggest("SOLVER.EPOCHS", epochs_for(trained))
    draft.suggest("SOLVER.SCHEDULE", "cosine")
    draft.suggest("SOLVER.WARMUP_EPOCHS", round(0.05 * epochs, 2))
    draft.notes.append(
        f"training: SOLVER.EPOCHS {epochs} of {trained // batch:,} steps, BATCH_SIZE {batch}, "
        f"{optimizer}, SCHEDULE {solver.SCHEDULE}"
    )
    _quicken(draft, trained // batch)
    if "TEACHER" in _trained(draft):
        teacher_epochs = draft.suggest("TEACHER.EPOCHS", epochs)
        draft.notes.append(
            f"teacher: has no weights for these classes (--weights F gives them), so it is trained "
            f"first, TEACHER.EPOCHS {teacher_epochs}, and kept in {draft.cfg.TEACHER.CACHE_DIR} "
            "for other runs"
        )


def _trained(draft: _Draft) -> list[str]:
    """Return the roles whose models are trained, with the same settings."""
    return [role for role in draft.models if role == "STUDENT" or draft.cfg.TEACHER.TRAIN]


def _sgd(draft: _Draft, batch: int) -> str:
    """Choose the learning rate for models with batch norm; return its description."""
    return f"BASE_LR {draft.suggest('SOLVER.BASE_LR', 0.1 * min(1.0, batch / 128)):g}"


def _adamw(draft: _Draft, without: Sequence[str]) -> str:
    """Choose AdamW's settings; return their description.

    Weight decay, its exemptions and clipping are those that ViT, DeiT, Swin and ConvNeXt are
    trained with; so is the learning rate, at their batches of 1,024 images. It is not scaled by
    the batch size: in so few steps, students learn less with smaller rates.
    """
    rate = draft.suggest("SOLVER.BASE_LR", ADAMW_LR)
    decay = draft.suggest("SOLVER.WEIGHT_DECAY", 0.05)
    draft.suggest("SOLVER.DECAY_NORMS_AND_BIASES", False)
    clip = draft.suggest("SOLVER.CLIP_GRADIENTS", 1.0)
    models = " and ".join(role.lower() for role in without)
    why = f" (no batch norm in the {models})" if without else ""
    told = f"BASE_LR {rate:g}, WEIGHT_DECAY {decay:g}, CLIP_GRADIENTS {clip:g}"
    return f"OPTIMIZER adamw{why}, {told}"


def _quicken(draft: _Draft, steps: int) -> None:
    """Raise the momentum of batch norms that would need more than an epoch to adapt."""
    for role in _trained(draft):
        norms = running_norms(draft.models[role]).values()
        slowest = min((norm.momentum or 1.0 for norm in norms), default=1.0)
        if slowest < USUAL_MOMENTUM and slowest * steps < 1:
            momentum = draft.suggest(f"{role}.BN_MOMENTUM", USUAL_MOMENTUM)
            draft.notes.append(
                f"batch norm: {role}.BN_MOMENTUM {momentum:g}: the model's own, {slowest:g}, would "
                "need more than an epoch to adapt"
            )


def batch_size(images: int) -> int:
    """Return a batch size: dozens of steps per epoch, yet enough samples to relate in a batch."""
    return next((batch for most, batch in BATCH_SIZES if images < most), LARGEST_BATCH)


def epochs_for(images: int) -> int:
    """Return ``100 * (1000 / images)^(1/8)``, within 30 to 100: fewer epochs for more images."""
    return min(max(round(100 * (1000 / max(images, 1)) ** (1 / 8)), 30), 100)
