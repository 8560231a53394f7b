"""Evaluate a classifier: ``python classification/evaluate.py --config-file F [--weights W]``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fvcore.common.config import CfgNode

from classification.arguments import evaluate_parser
from classification.batch_norm import recalibrate
from classification.config import default_config, load_config
from classification.data import load_evaluation_set, load_image_sets, pixel_statistics
from classification.evaluation import accuracy
from classification.models import has_own_weights, load_classifier, named_model, settings_of
from pcka.checkpoint import save_student
from pcka.engine.arguments import take_pairs
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.environment import choose_device
from pcka.engine.progress import console_log

logger = logging.getLogger("pcka")


def evaluate(
    cfg: CfgNode, *, role: str = "student", weights: str = "", recalibrated: int = 0
) -> dict[str, float]:
    """Return ``{"top1": percent}``, with ``top5`` where there are more than five classes.

    Args:
        cfg: says the data, and the model and its pixel statistics in STUDENT or TEACHER.
        role: "student" or "teacher".
        weights: checkpoint; "" takes the section's WEIGHTS.
        recalibrated: estimate batch norm's running statistics anew on so many training images,
            and write the model beside ``weights`` as ``<name>_recalibrated.pth``; 0: as it is.
    """
    section = cfg[role.upper()]
    weights = weights or section.WEIGHTS
    if not section.NAME or not (weights or has_own_weights(section)):
        raise ConfigError(
            f"{role.upper()}: expected a model and its weights, got NAME {section.NAME!r} and "
            f"WEIGHTS {weights!r}; give --weights, or set {role.upper()}.NAME and .WEIGHTS"
        )
    device = choose_device(cfg.DEVICE)
    given = {"role": role, **settings_of(section)}
    if recalibrated:
        train_set, data = (images.to(device) for images in load_image_sets(cfg))
    else:
        data = load_evaluation_set(cfg).to(device)
    if weights:
        model = load_classifier(section.NAME, weights, len(data.classes), **given)
    else:
        model = named_model(section.NAME, len(data.classes), **given)
    model.to(device)
    pixels = pixel_statistics(section).to(device)
    if recalibrated:
        logger.info("as it is: %s", told(accuracy(model, pixels, data)))
        recalibrate(model, pixels, train_set, cfg, recalibrated)
        path = Path(weights or section.NAME.rpartition("/")[2])
        path = path.with_name(f"{path.stem}_recalibrated.pth")
        save_student(model, path)
        logger.info("recalibrated: %s", path)
    return accuracy(model, pixels, data)


def told(result: dict[str, float]) -> str:
    """The accuracies in a line."""
    return "  ".join(f"{name} {value:.2f} %" for name, value in result.items())


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Evaluate as the arguments say; print and return the accuracies."""
    words, pairs = take_pairs(sys.argv[1:] if arguments is None else arguments, default_config())
    given = evaluate_parser().parse_intermixed_args(words)
    cfg = load_config(given.config_file, [*pairs, *given.overrides])
    with console_log():
        result = evaluate(
            cfg, role=given.role, weights=given.weights, recalibrated=given.recalibrate_bn
        )
    print(told(result))
    return result


if __name__ == "__main__":
    run_command(main)
