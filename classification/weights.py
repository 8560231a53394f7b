"""Classifiers with weights from a file."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from classification.models import create_model
from pcka.checkpoint import load_weights

logger = logging.getLogger("classification")


def load_classifier(name: str, weights: str | Path, num_classes: int, *, role: str) -> nn.Module:
    """Return the model ``name`` with the weights of a checkpoint.

    Args:
        name: of ``classification.models.model_names()``.
        weights: checkpoint in any layout that ``pcka.checkpoint`` knows.
        num_classes: classes of the data.
        role: "student" or "teacher": which of the two where the file holds both.

    Raises:
        ValueError: the checkpoint's classifier has another number of classes (both are named), or
            the checkpoint does not fill the model.
    """
    model = create_model(name, num_classes)
    report = load_weights(model, weights, role=role, allow_partial=True)
    key = f"{role.upper()}.WEIGHTS"
    for entry in report.mismatched:
        if entry.name == f"{model.classifier_name}.weight":
            raise ValueError(
                f"{key}: {str(weights)!r} is a classifier of {entry.in_file[0]} classes, the data "
                f"has {num_classes}; give the weights of a {name} trained on these classes"
            )
    if not report.complete:
        raise ValueError(f"{key}: {str(weights)!r} is not the checkpoint of a {name}: {report}")
    logger.info("%s %s: %s", role, name, report)
    return model
