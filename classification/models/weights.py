"""Classifiers with weights from a file."""

from __future__ import annotations

import logging
from pathlib import Path

from classification.models.registry import Classifier, create_model
from pcka.checkpoint import load_weights
from pcka.engine.config import ConfigError
from pcka.files import CheckpointError

logger = logging.getLogger("pcka")


def named_model(name: str, num_classes: int, *, role: str) -> Classifier:
    """:func:`create_model` of the ``NAME`` of a role, "student" or "teacher".

    Raises:
        ConfigError: no model has this name; near ones are named.
    """
    try:
        return create_model(name, num_classes)
    except ValueError as error:
        raise ConfigError(f"{role.upper()}.NAME: {str(error).removeprefix('name: ')}") from error


def load_classifier(name: str, weights: str | Path, num_classes: int, *, role: str) -> Classifier:
    """Return the model ``name`` with the weights of a checkpoint.

    Args:
        name: of ``classification.models.model_names()``.
        weights: checkpoint in any layout that ``pcka.checkpoint`` knows.
        num_classes: classes of the data.
        role: "student" or "teacher": which of the two where the file holds both.

    Raises:
        ConfigError: the checkpoint's classifier has another number of classes (both are named),
            the checkpoint does not fill the model, is damaged, or holds what is no weight.
    """
    model = named_model(name, num_classes, role=role)
    key = f"{role.upper()}.WEIGHTS"
    try:
        report = load_weights(model, weights, role=role, allow_partial=True)
    except CheckpointError as error:
        raise ConfigError(f"{key}: {error}") from error
    for entry in report.mismatched:
        if entry.name == f"{model.classifier_name}.weight" and entry.in_file:
            raise ConfigError(
                f"{key}: {str(weights)!r} is a classifier of {entry.in_file[0]} classes, the data "
                f"has {num_classes}; give the weights of a {name} trained on these classes"
            )
    if not report.complete:
        raise ConfigError(f"{key}: {str(weights)!r} is not the checkpoint of a {name}: {report}")
    logger.info("%s %s: %s", role, name, report)
    return model
