"""From the configuration to the losses, the taps and the pixel statistics of a distillation."""

from __future__ import annotations

from fvcore.common.config import CfgNode
from torch import nn

from classification.data import PixelNormalize
from pcka import losses

# The pooled features of every model of the zoo.
POOLED = {"pooled": ("avgpool", "avgpool")}


def build_losses(cfg: CfgNode) -> list[losses.Loss]:
    """Return the losses of ``DISTILL.METHODS``, each with the keywords of its section.

    Raises:
        ValueError: values that a loss refuses, or a loss that needs a teacher where there is none.
    """
    built = []
    for name in cfg.DISTILL.METHODS:
        section = cfg.DISTILL[name].items()
        keywords = {k.lower(): tuple(v) if isinstance(v, list) else v for k, v in section}
        try:
            loss = losses.build(name, **keywords)
        except ValueError as error:
            raise ValueError(f"DISTILL.{name}: {error}") from error
        if loss.needs_teacher and not cfg.TEACHER.NAME:
            raise ValueError(
                f"DISTILL.METHODS: {name} needs a teacher and TEACHER.NAME is empty; name one, "
                "with its TEACHER.WEIGHTS or with TEACHER.TRAIN True"
            )
        built.append(loss)
    return built


def stage_taps(student: nn.Module, teacher: nn.Module) -> dict[str, tuple[str, str]]:
    """Return ``stage{i}`` -> (student path, teacher path), ``i`` counting the student's stages.

    Stage 0 is the stem. Models with different numbers of stages are aligned at their last ones.

    Args:
        student: has ``stage_names``.
        teacher: has ``stage_names``.
    """
    ahead = len(teacher.stage_names) - len(student.stage_names)
    return {
        f"stage{index}": (path, teacher.stage_names[index + ahead])
        for index, path in enumerate(student.stage_names)
        if index + ahead >= 0
    }


def pixel_statistics(role: CfgNode) -> PixelNormalize:
    """Return the normalisation of the section STUDENT or TEACHER."""
    return PixelNormalize(role.PIXEL_MEAN, role.PIXEL_STD)
