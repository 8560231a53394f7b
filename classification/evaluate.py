"""Evaluate a classifier: ``python classification/evaluate.py --config-file F [--weights W]``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fvcore.common.config import CfgNode

from classification.arguments import evaluate_parser
from classification.batch_norm import recalibrate
from classification.config import default_config, load_config, teachers_of
from classification.data import ImageSet, load_evaluation_set, load_image_sets, pixel_statistics
from classification.evaluation import accuracy
from classification.models import Classifier, has_own_weights, model_of
from classification.preflight import check_logits
from classification.teacher import as_one
from pcka.checkpoint import save_student
from pcka.engine.arguments import take_pairs
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.environment import choose_device
from pcka.engine.progress import console_log

logger = logging.getLogger("pcka")


def evaluate(
    cfg: CfgNode,
    *,
    role: str = "student",
    weights: str = "",
    recalibrated: int = 0,
    report: Path | None = None,
) -> dict[str, float]:
    """Return ``{"top1": percent}``, with ``top5`` where there are more than five classes.

    Args:
        cfg: gives the data and, in STUDENT or TEACHER, the model and its pixel statistics.
        role: "student" or "teacher"; several teachers count as one.
        weights: checkpoint of the model (of several teachers, of the first, which is then
            evaluated alone); "" takes the section's WEIGHTS.
        recalibrated: re-estimate batch norm's running statistics on this many training images,
            and write the model beside ``weights`` as ``<name>_recalibrated.pth``; 0: as it is.
        report: folder for the report of the student beside its teacher; None: no report.

    Raises:
        ConfigError: no model or weights, logits of other classes, several teachers to recalibrate,
            or a report on a teacher.
    """
    if report is not None and role == "teacher":
        raise ConfigError("--report: compares a student with its teacher; omit --role")
    device = choose_device(cfg.DEVICE)
    key = role.upper()
    ones = teachers_of(cfg) if role == "teacher" and not weights else [cfg]
    for one in ones:
        _check_weights(one[key], role, weights)
    if not recalibrated and report is not None:
        return _reported(cfg, weights or cfg.STUDENT.WEIGHTS, report)
    if not recalibrated:
        data = load_evaluation_set(cfg).to(device)
        model = as_one(cfg, [_model(one, role, weights, data) for one in ones])
        return accuracy(model, pixel_statistics(ones[0][key]).to(device), data)
    if len(ones) > 1:
        raise ConfigError(
            "--recalibrate-bn: expected one model, got several teachers; name one with --weights"
        )
    result, path = _recalibrated(cfg, role, weights, recalibrated)
    return result if report is None else _reported(cfg, str(path), report)


def _reported(cfg: CfgNode, weights: str, folder: Path) -> dict[str, float]:
    """Write the report of the student, and return its accuracies."""
    from classification.report import STUDENT, Material, make_report  # heavy imports

    made = make_report(Material(cfg, {STUDENT: Path(weights) if weights else None}))
    logger.info("report: %s", made.write(folder))
    found = made.data["models"][STUDENT]
    return {name: found[name] for name in ("top1", "top5") if name in found}


def _recalibrated(
    cfg: CfgNode, role: str, weights: str, images: int
) -> tuple[dict[str, float], Path]:
    """Recalibrate a model and write it; return its accuracies and its file."""
    device, section = choose_device(cfg.DEVICE), cfg[role.upper()]
    train_set, data = (one.to(device) for one in load_image_sets(cfg))
    model = _model(cfg, role, weights, data)
    pixels = pixel_statistics(section).to(device)
    logger.info("original: %s", told(accuracy(model, pixels, data)))
    recalibrate(model, pixels, train_set, cfg, images)
    path = Path(weights or section.WEIGHTS or section.NAME.rpartition("/")[2])
    path = path.with_name(f"{path.stem}_recalibrated.pth")
    save_student(model, path)
    logger.info("recalibrated: %s", path)
    return accuracy(model, pixels, data), path


def _model(cfg: CfgNode, role: str, weights: str, data: ImageSet) -> Classifier:
    """Return one model on the device of the images."""
    classes = len(data.classes)
    model = model_of(cfg[role.upper()], classes, role=role, weights=weights).to(data.device)
    check_logits(model, role, cfg, classes)
    return model


def _check_weights(section: CfgNode, role: str, weights: str) -> None:
    weights = weights or section.WEIGHTS
    if not section.NAME or not (weights or has_own_weights(section)):
        raise ConfigError(
            f"{role.upper()}: expected a model and its weights, got NAME {section.NAME!r} and "
            f"WEIGHTS {weights!r}; give --weights, or set {role.upper()}.NAME and .WEIGHTS"
        )


def told(result: dict[str, float]) -> str:
    """Format the accuracies on one line."""
    return "  ".join(f"{name} {value:.2f} %" for name, value in result.items())


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Evaluate as the arguments say; print and return the accuracies."""
    words, pairs = take_pairs(sys.argv[1:] if arguments is None else arguments, default_config())
    given = evaluate_parser().parse_intermixed_args(words)
    cfg = load_config(given.config_file, [*pairs, *given.overrides])
    with console_log():
        result = evaluate(
            cfg,
            role=given.role,
            weights=given.weights,
            recalibrated=given.recalibrate_bn,
            report=given.report,
        )
    print(told(result))
    return result


if __name__ == "__main__":
    run_command(main)
