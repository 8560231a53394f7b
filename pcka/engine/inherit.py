"""Initialising a student with parts of its teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pcka.engine.config import ConfigError


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
    student: nn.Module, given: Mapping[str, Tensor], prefixes: Sequence[str], logger: logging.Logger
) -> list[str]:
    """Copy the teacher's weights under ``prefixes`` where name and shape match; log how many.

    Args:
        student: receives the weights.
        given: the teacher's weights by name, including its heads.
        prefixes: start of the weights' names, e.g. ``"head."``, ``"fc."``.
        logger: logs how many weights were copied.

    Returns:
        The names that were copied.

    Raises:
        ConfigError: a prefix under which nothing matches.
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
        copied += fitting
    with torch.no_grad():
        for name in copied:
            own[name].copy_(given[name])
    return copied
