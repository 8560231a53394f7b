"""The weights of a teacher's file, heads included, for a student that inherits some of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detection.checkpoint import SafeCheckpointer, WeightsError
from pcka.engine.config import ConfigError


def teacher_weights(student: nn.Module, file: str) -> dict[str, Tensor]:
    """Return the weights of the teacher's file by name.

    Args:
        student: the student; its checkpointer reads the file.
        file: a path or a URL.

    Raises:
        ConfigError: ``file`` is empty, or cannot be read.
    """
    if not file:
        raise ConfigError("DISTILL.INHERIT: a teacher with random weights has none to inherit")
    try:
        given = SafeCheckpointer(student).read(file)["model"]
    except WeightsError as error:
        raise ConfigError(f"DISTILL.TEACHER.WEIGHTS: {error}") from error
    return {name: torch.as_tensor(value) for name, value in given.items()}
