"""What is tried on a few images before a training begins, so that nothing fails later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from classification.data import ImageSet
from classification.distillation import pixel_statistics
from pcka.distiller import Distiller
from pcka.engine.config import ConfigError
from pcka.losses import Context
from pcka.modes import evaluation_mode
from pcka.teacher import FrozenTeacher

IMAGES = 16


def prepare_distiller(
    cfg: CfgNode, distiller: Distiller, context: Context, train_set: ImageSet
) -> None:
    """Let the losses size their adapters; try teacher and losses. The student stays as it is.

    Args:
        cfg: pixel statistics and COMPILE are read.
        distiller: with a teacher, on the device of the images.
        context: what the losses need to know of the run.
        train_set: some images of it serve, from all over the set.

    Raises:
        ConfigError: features that a loss cannot compare, a loss without terms, or a teacher that
            has nothing to teach.
    """
    spaced = torch.linspace(0, len(train_set) - 1, min(IMAGES, len(train_set))).long()
    pixels, labels, _ = next(train_set.subset(spaced).evaluation_batches())
    images, teacher_images = (
        pixel_statistics(role).to(pixels.device)(pixels) for role in (cfg.STUDENT, cfg.TEACHER)
    )
    with naming("DISTILL"):
        distiller.prepare(images[:2], teacher_images[:2], context)
    assert distiller.teacher is not None
    logits = any(loss.needs_logits and loss.needs_teacher for loss in distiller.losses)
    check_teaching(distiller.teacher, distiller.teacher_paths, teacher_images, logits=logits)
    if not cfg.COMPILE:  # else the first step tries the losses: to compile for them takes minutes
        indices = spaced.to(images.device)
        _try_losses(distiller, images, labels, teacher_images, indices)


def _try_losses(
    distiller: Distiller, images: Tensor, labels: Tensor, teacher_images: Tensor, indices: Tensor
) -> None:
    """Refuse losses that cannot compare what they tap, or that give no term at all."""
    devices = [images.device] if images.is_cuda else []
    with (
        naming("DISTILL"),
        torch.no_grad(),
        torch.random.fork_rng(devices),
        evaluation_mode(distiller),
    ):
        distiller(images, labels, teacher_images, indices=indices)


@contextmanager
def naming(section: str) -> Iterator[None]:
    """Name the section of the configuration, whatever in the block is refused."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{section}: {error}") from error


@torch.no_grad()
def check_teaching(
    teacher: FrozenTeacher, taps: Mapping[str, str], images: Tensor, *, logits: bool
) -> None:
    """Refuse a teacher that has nothing to teach: what it gives is one for all images, or none.

    Args:
        teacher: on the images' device.
        taps: name -> path in the teacher of what the losses read.
        images: (B, 3, S, S), normalised for the teacher. Where they are all the same, nothing can
            be said.
        logits: whether the losses read the logits too.

    Raises:
        ConfigError: the tap is named.
    """
    if _is_constant(images):
        return
    outputs = teacher.observer(taps)(images)
    read = {f"{name} ({taps[name]})": feature for name, feature in outputs.features.items()}
    if logits and outputs.logits is not None:
        read["logits"] = outputs.logits
    for name, feature in read.items():
        if not feature.isfinite().all():
            fault = "are not finite"
        elif _is_constant(feature):
            fault = "are the same for every image, so that no alignment with them can be learned"
        else:
            continue
        raise ConfigError(
            f"TEACHER: its {name} {fault}; check TEACHER.WEIGHTS, TEACHER.PIXEL_MEAN and "
            "PIXEL_STD, or leave this tap out"
        )


def _is_constant(feature: Tensor) -> bool:
    """Whether nothing but rounding is left of the features once their mean is subtracted."""
    rows = feature.flatten(1).double()
    bound = 8 * torch.finfo(torch.float32).eps * rows.norm()
    return bool((rows - rows.mean(0)).norm() <= bound)
