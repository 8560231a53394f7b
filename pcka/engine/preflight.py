"""Checks on a few inputs before training starts, so that nothing fails later."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pcka.distiller import Distiller
from pcka.engine.config import ConfigError
from pcka.modes import evaluation_mode
from pcka.taps import TapError
from pcka.teacher import FrozenTeacher

LARGEST = 1e6  # magnitude of a feature; those of trained models stay below 1e3


@contextmanager
def naming(section: str) -> Iterator[None]:
    """Turn errors in the block into a ``ConfigError`` that names the configuration section."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TapError) as error:
        raise ConfigError(f"{section}: {error}") from error


def try_losses(distiller: Distiller, *inputs: Any, **keywords: Any) -> dict[str, Tensor]:
    """Return the terms of a prepared distiller; models, losses and random states stay unchanged.

    Raises:
        ConfigError: a loss cannot compare what it taps, or yields no term.
    """
    devices = list({p.device for p in distiller.parameters() if p.is_cuda})
    with naming("DISTILL"), torch.random.fork_rng(devices), evaluation_mode(distiller):
        return distiller(*inputs, **keywords)


def untrained_parameters(distiller: Distiller, *inputs: Any, **keywords: Any) -> list[str]:
    """Return the names of the parameters that require a gradient and get none from any term.

    Such as a classifier if no loss reads the logits, or a transformer's token for masked patches.
    The models run as :func:`try_losses` runs them, without compiling.
    """
    trained = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    with torch.compiler.set_stance("force_eager"):
        terms = try_losses(distiller, *inputs, **keywords)
    total = torch.stack(list(terms.values())).sum()
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]


@torch.no_grad()
def check_teaching(
    teacher: FrozenTeacher, taps: Mapping[str, str], images: Tensor, *, logits: bool
) -> None:
    """Refuse a teacher with nothing to teach: outputs not finite, or equal for all images.

    Args:
        teacher: on the images' device.
        taps: name -> path in the teacher, of the features that the losses read.
        images: (B, 3, S, S), normalised for the teacher. If they are all the same, nothing is
            checked.
        logits: whether the losses read the logits too.

    Raises:
        ConfigError: an output has nothing to teach; its tap is named.
    """
    if is_constant(images):
        return
    outputs = teacher.observer(taps)(images)
    read = {f"{name} ({taps[name]})": feature for name, feature in outputs.features.items()}
    if logits and outputs.logits is not None:
        read["logits"] = outputs.logits
    for name, feature in read.items():
        if fault := feature_fault(feature):
            raise ConfigError(
                f"TEACHER: values of {name} {fault}; check TEACHER.WEIGHTS, TEACHER.PIXEL_MEAN and "
                "PIXEL_STD, or leave this tap out"
            )


def feature_fault(feature: Tensor, largest: float = math.inf) -> str:
    """What is wrong with a teacher's features of different images; "" if nothing.

    Args:
        feature: (B, ...), one row per image.
        largest: magnitude that no trained model's features exceed.
    """
    if not feature.isfinite().all():
        return "are not finite"
    if (reached := feature.abs().max().item()) > largest:
        return f"reach {reached:.0e}, unlike those of a trained model"
    if is_constant(feature):
        return "are the same for every image, so that no alignment with them can be learned"
    return ""


def is_constant(feature: Tensor) -> bool:
    """Whether only rounding errors are left once the mean of the features is subtracted."""
    rows = feature.flatten(1).double()
    bound = 8 * torch.finfo(torch.float32).eps * rows.norm()
    return bool((rows - rows.mean(0)).norm() <= bound)
