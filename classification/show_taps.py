"""What can be tapped in the two models of a configuration."""

from __future__ import annotations

from fvcore.common.config import CfgNode
from tabulate import tabulate

from classification.config import teacher_name
from classification.models.taps import model_taps, tap_shapes
from classification.run import untrained_pair
from pcka.engine.config import ConfigError


def tap_table(cfg: CfgNode) -> str:
    """Return the taps of a configuration as a table: names, paths and shapes in both models."""
    student, teacher = untrained_pair(cfg)
    taps = model_taps(student, teacher or student, cfg.DISTILL.TAPS)
    heading, columns = ["tap"], [list(taps)]
    for role, side, model in (("student", 0, student), ("teacher", 1, teacher)):
        if model is None:
            continue
        paths = {name: pair[side] for name, pair in taps.items()}
        try:
            shapes = tap_shapes(model, paths, cfg.DATA.IMAGE_SIZE)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"DISTILL.TAPS: {role}: {error}") from error
        name = cfg.STUDENT.NAME if role == "student" else teacher_name(cfg)
        heading += [f"{role}: {name}", "shape"]
        columns += [list(paths.values()), [shapes[name] for name in taps]]
    return tabulate(list(zip(*columns)), heading, tablefmt="plain", disable_numparse=True)
