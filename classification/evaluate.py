"""Evaluate a classifier: ``python classification/evaluate.py --config-file F [--weights W]``."""

from __future__ import annotations

from collections.abc import Sequence

from fvcore.common.config import CfgNode

from classification.config import config_arguments, load_config, teachers_of
from classification.data import load_evaluation_set, pixel_statistics
from classification.evaluation import accuracy
from classification.models import (
    Classifier,
    has_own_weights,
    load_classifier,
    named_model,
    settings_of,
)
from classification.teacher import as_one
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.environment import choose_device
from pcka.engine.progress import console_log


def evaluate(cfg: CfgNode, *, role: str = "student", weights: str = "") -> dict[str, float]:
    """Return ``{"top1": percent}``, with ``top5`` where there are more than five classes.

    Args:
        cfg: says the data, and the model and its pixel statistics in STUDENT or TEACHER.
        role: "student" or "teacher", several of them as one.
        weights: checkpoint of the (first) model; "" takes the section's WEIGHTS.
    """
    device = choose_device(cfg.DEVICE)
    sections = [cfg[role.upper()]]
    if role == "teacher" and not weights:
        sections = [one.TEACHER for one in teachers_of(cfg)]
    for section in sections:
        _check_weights(section, role, weights)
    data = load_evaluation_set(cfg).to(device)
    models = [_model(section, role, weights, len(data.classes)) for section in sections]
    model = as_one(cfg, models).to(device)
    return accuracy(model, pixel_statistics(sections[0]).to(device), data)


def _check_weights(section: CfgNode, role: str, weights: str) -> None:
    weights = weights or section.WEIGHTS
    if not section.NAME or not (weights or has_own_weights(section)):
        raise ConfigError(
            f"{role.upper()}: expected a model and its weights, got NAME {section.NAME!r} and "
            f"WEIGHTS {weights!r}; give --weights, or set {role.upper()}.NAME and .WEIGHTS"
        )


def _model(section: CfgNode, role: str, weights: str, classes: int) -> Classifier:
    weights, given = weights or section.WEIGHTS, {"role": role, **settings_of(section)}
    if weights:
        return load_classifier(section.NAME, weights, classes, **given)
    return named_model(section.NAME, classes, **given)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Evaluate as the arguments say; print and return the accuracies."""
    parser = config_arguments("Evaluate a classifier on the evaluation images of a configuration.")
    parser.add_argument("--weights", default="", metavar="W", help="checkpoint of the model")
    parser.add_argument("--role", choices=("student", "teacher"), default="student")
    given = parser.parse_intermixed_args(arguments)
    cfg = load_config(given.config_file, given.overrides)
    with console_log():
        result = evaluate(cfg, role=given.role, weights=given.weights)
    print("  ".join(f"{name} {value:.2f} %" for name, value in result.items()))
    return result


if __name__ == "__main__":
    run_command(main)
