"""A student that starts from parts of its teacher."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from detection.checkpoint import SafeCheckpointer
from pcka.engine.config import ConfigError

logger = logging.getLogger("detectron2.pcka")


def inherit_weights(student: nn.Module, teacher_weights: str, prefixes: Sequence[str]) -> list[str]:
    """Copy the teacher's weights under ``prefixes`` where name and shape match; report them.

    Args:
        student: takes the weights.
        teacher_weights: the teacher's file or URL, which holds its heads as well.
        prefixes: of the weights' names, e.g. ``"head."`` or ``"roi_heads.box_predictor."``.

    Returns:
        The names that were copied.

    Raises:
        ConfigError: no weights, or a prefix under which nothing matches.
    """
    if not teacher_weights:
        raise ConfigError("DISTILL.INHERIT: a teacher with random weights has none to inherit")
    checkpointer = SafeCheckpointer(student)
    local = checkpointer.path_manager.get_local_path(teacher_weights)
    given = checkpointer._load_file(local)["model"]
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
        logger.info("Inherited %d of %d weights under %r", len(fitting), len(names), prefix)
        copied += fitting
    with torch.no_grad():
        for name in copied:
            own[name].copy_(torch.as_tensor(given[name]))
    return copied
