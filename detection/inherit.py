"""The weights of a teacher's file, heads included, for a student that inherits some of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detection.checkpoint import SafeCheckpointer
from pcka.engine.config import ConfigError


def teacher_weights(student: nn.Module, file: str) -> dict[str, Tensor]:
    """Return the weights of the teacher's file by name.

    Args:
        student: the student; its checkpointer reads the file.
        file: a path or a URL.

    Raises:
        ConfigError: ``file`` is empty.
    """
    if not file:
        raise ConfigError("DISTILL.INHERIT: a teacher with random weights has none to inherit")
    checkpointer = SafeCheckpointer(student)
    local = checkpointer.path_manager.get_local_path(file)
    given = checkpointer._load_file(local)["model"]
    return {name: torch.as_tensor(value) for name, value in given.items()}
