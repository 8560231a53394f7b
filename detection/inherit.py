"""What a detector inherits of its teacher: weights by name, if both read the same images."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
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


def unlike_images(student: CfgNode, teacher: CfgNode) -> list[str]:
    """Return the keys of the images' form in which two configurations differ."""
    pairs = {
        "INPUT.FORMAT": (student.INPUT.FORMAT, teacher.INPUT.FORMAT),
        "MODEL.PIXEL_MEAN": (student.MODEL.PIXEL_MEAN, teacher.MODEL.PIXEL_MEAN),
        "MODEL.PIXEL_STD": (student.MODEL.PIXEL_STD, teacher.MODEL.PIXEL_STD),
    }
    return [key for key, (own, given) in pairs.items() if own != given]
