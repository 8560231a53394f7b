"""What can be tapped in the two models of a configuration."""

from __future__ import annotations

from fvcore.common.config import CfgNode
from tabulate import tabulate

from classification.config import teacher_name
from classification.models.taps import model_taps, read_taps, unlike_signs
from classification.run import untrained_pair
from pcka.engine.config import ConfigError

BEHIND = (
    "So one is before an activation and the other after one. If both models are of the same kind, "
    "tap both at the same place (DISTILL.TAPS)."
)


def tap_table(cfg: CfgNode) -> str:
    """Return the taps of a configuration as a table: names, paths and shapes in both models."""
    student, teacher = untrained_pair(cfg)
    taps = model_taps(student, teacher or student, cfg.DISTILL.TAPS)
    heading, columns = ["tap"], [list(taps)]
    readings = []
    for role, side, model in (("student", 0, student), ("teacher", 1, teacher)):
        if model is None:
            continue
        paths = {name: pair[side] for name, pair in taps.items()}
        try:
            found = read_taps(model, paths, cfg.DATA.IMAGE_SIZE)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"DISTILL.TAPS: {role}: {error}") from error
        name = cfg.STUDENT.NAME if role == "student" else teacher_name(cfg)
        heading += [f"{role}: {name}", "shape"]
        columns += [list(paths.values()), [found[name].shape for name in taps]]
        # Few losses read a stage before its activation; few models have such a place.
        readings.append({n: r for n, r in found.items() if not n.endswith("_preact")})
    table = tabulate(list(zip(*columns)), heading, tablefmt="plain", disable_numparse=True)
    notes = unlike_signs(*readings) if len(readings) > 1 else []
    return "\n".join([table, *notes, *([BEHIND] if notes else [])])
