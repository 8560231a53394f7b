"""Evaluate a classifier: ``python classification/evaluate.py --config-file F [--weights W]``."""

from __future__ import annotations

from collections.abc import Sequence

from fvcore.common.config import CfgNode

from classification.arguments import evaluate_parser
from classification.config import load_config
from classification.data import load_evaluation_set, pixel_statistics
from classification.evaluation import accuracy
from classification.models import has_own_weights, load_classifier, named_model, settings_of
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.environment import choose_device
from pcka.engine.progress import console_log


def evaluate(cfg: CfgNode, *, role: str = "student", weights: str = "") -> dict[str, float]:
    """Return ``{"top1": percent}``, with ``top5`` where there are more than five classes.

    Args:
        cfg: says the data, and the model and its pixel statistics in STUDENT or TEACHER.
        role: "student" or "teacher".
        weights: checkpoint; "" takes the section's WEIGHTS.
    """
    section = cfg[role.upper()]
    weights = weights or section.WEIGHTS
    if not section.NAME or not (weights or has_own_weights(section)):
        raise ConfigError(
            f"{role.upper()}: expected a model and its weights, got NAME {section.NAME!r} and "
            f"WEIGHTS {weights!r}; give --weights, or set {role.upper()}.NAME and .WEIGHTS"
        )
    device = choose_device(cfg.DEVICE)
    data = load_evaluation_set(cfg).to(device)
    given = {"role": role, **settings_of(section)}
    if weights:
        model = load_classifier(section.NAME, weights, len(data.classes), **given)
    else:
        model = named_model(section.NAME, len(data.classes), **given)
    model.to(device)
    return accuracy(model, pixel_statistics(section).to(device), data)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Evaluate as the arguments say; print and return the accuracies."""
    given = evaluate_parser().parse_intermixed_args(arguments)
    cfg = load_config(given.config_file, given.overrides)
    with console_log():
        result = evaluate(cfg, role=given.role, weights=given.weights)
    print("  ".join(f"{name} {value:.2f} %" for name, value in result.items()))
    return result


if __name__ == "__main__":
    run_command(main)
