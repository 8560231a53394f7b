"""Initialising a student with parts of its teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pcka.engine.config import ConfigError

IMAGE_CHANNELS = 3


def check_prefixes(prefixes: Sequence[object]) -> None:
    """Refuse entries of ``DISTILL.INHERIT`` that are not text.

    Raises:
        ConfigError: such an entry.
    """
    if not all(isinstance(prefix, str) for prefix in prefixes):
        raise ConfigError(
            "DISTILL.INHERIT: expected prefixes of the weights' names, such as ['fc.'], got "
            f"{list(prefixes)}"
        )


def inherit_weights(
    student: nn.Module,
    given: Mapping[str, Tensor],
    prefixes: Sequence[str],
    logger: logging.Logger,
    *,
    unlike: Sequence[str] = (),
) -> list[str]:
    """Copy the teacher's weights under ``prefixes`` where name and shape match; log how many.

    Args:
        student: receives the weights.
        given: the teacher's weights by name, including its heads.
        prefixes: start of the weights' names, e.g. ``"head."``, ``"fc."``.
        logger: logs how many weights were copied.
        unlike: keys of the images' form in which student and teacher differ; with any of them, a
            convolution that reads images is not copied.

    Returns:
        The names that were copied.

    Raises:
        ConfigError: a prefix under which nothing matches, or a convolution that would read images
            of another form.
    """
    own = student.state_dict()
    copied: list[str] = []
    for prefix in prefixes:
        names = [name for name in own if name.startswith(prefix) and name in given]
        fitting = [name for name in names if tuple(own[name].shape) == tuple(given[name].shape)]
        if not fitting:
            raise ConfigError(
                f"DISTILL.INHERIT: under {prefix!r} no weight of the teacher has the student's "
                f"name and shape ({len(names)} have the name); leave it out"
            )
        logger.info("inherited %d of %d weights under %r", len(fitting), len(names), prefix)
        if unlike and (reading := [name for name in fitting if _reads_images(student, name)]):
            raise ConfigError(
                f"DISTILL.INHERIT: {reading[0]} reads images, and {' and '.join(unlike)} of "
                "student and teacher differ; set the same for both, or inherit other parts"
            )
        copied += fitting
    with torch.no_grad():
        for name in copied:
            own[name].copy_(given[name])
    return copied


def _reads_images(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, nn.Conv2d) and module.in_channels == IMAGE_CHANNELS
