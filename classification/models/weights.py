"""Classifiers with weights from a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from classification.models.registry import Classifier, create_model
from pcka.checkpoint import load_weights
from pcka.engine.config import ConfigError
from pcka.files import CheckpointError

logger = logging.getLogger("pcka")


def settings_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return :func:`named_model`'s keywords from the section STUDENT or TEACHER."""
    return {"kwargs": _plain(section["KWARGS"]), "logits": section["LOGITS"]}


def without_weights(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return :func:`settings_of`, changed so that no weights of the model's library are loaded."""
    settings = settings_of(section)
    return {**settings, "kwargs": _unread(section["NAME"], settings["kwargs"])}


def has_own_weights(section: Mapping[str, Any]) -> bool:
    """Whether a model is loaded with the weights of its library or folder."""
    asked = section["KWARGS"].get("pretrained")
    if asked is None and section["NAME"].startswith("hf/"):
        from classification.models.libraries import folder_has_weights

        return folder_has_weights(section["NAME"].removeprefix("hf/"))
    return bool(asked)


def named_model(
    name: str,
    num_classes: int,
    *,
    role: str,
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    logits: str = "",
) -> Classifier:
    """Return the model ``name`` as its constructor makes it.

    Args:
        name: as ``classification.models.create_model`` takes it.
        num_classes: number of logits.
        role: "student" or "teacher": whose ``NAME`` it is.
        kwargs: keywords of the model's constructor.
        logits: key of the logits in the model's output; "" finds them automatically.

    Raises:
        ConfigError: an unknown name (the message suggests close matches), or rejected keywords.
    """
    if "num_classes" in kwargs:
        raise ConfigError(
            f"{role.upper()}.KWARGS: num_classes is the number of classes of the data; leave it out"
        )
    try:
        model = create_model(name, num_classes, **kwargs)
    except ValueError as error:
        key, _, reason = str(error).partition(": ")
        key, reason = (key.upper(), reason) if key in ("name", "kwargs") else ("NAME", str(error))
        raise ConfigError(f"{role.upper()}.{key}: {reason}") from error
    if not logits:
        return model
    from classification.models.logits import give_logits  # few models need it

    return cast(Classifier, give_logits(model, logits))


def load_classifier(
    name: str,
    weights: str | Path,
    num_classes: int,
    *,
    role: str,
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    logits: str = "",
) -> Classifier:
    """Return the model ``name`` with the weights of a checkpoint.

    Args:
        name: as ``classification.models.create_model`` takes it.
        weights: checkpoint in any layout that ``pcka.checkpoint`` supports.
        num_classes: classes of the data.
        role: "student" or "teacher": which of the two to load if the file holds both.
        kwargs: as for :func:`named_model`; weights of the model's library are not loaded.
        logits: likewise.

    Raises:
        ConfigError: the checkpoint's classifier has a different number of classes (the message
            gives both), or the checkpoint does not fill the model, is damaged, or holds something
            other than weights.
    """
    kwargs = _unread(name, kwargs)
    model = named_model(name, num_classes, role=role, kwargs=kwargs, logits=logits)
    key = f"{role.upper()}.WEIGHTS"
    try:
        report = load_weights(model, weights, role=role, allow_partial=True)
    except CheckpointError as error:
        raise ConfigError(f"{key}: {str(error).removeprefix('path: ')}") from error
    for entry in report.mismatched:
        if entry.name == f"{model.classifier_name}.weight" and entry.in_file:
            raise ConfigError(
                f"{key}: {str(weights)!r} is a classifier of {entry.in_file[0]} classes, but the "
                f"data has {num_classes}; use weights of a {name} trained on these classes"
                + _from_library(name, role)
            )
    if not report.complete:
        # transformers saves weights under other names than its models' parameters.
        of_hub = f" (to read a transformers folder, leave {key} empty)"
        raise ConfigError(
            f"{key}: {str(weights)!r} is not the checkpoint of a {name}: {report}"
            + (of_hub if name.startswith("hf/") else "")
        )
    logger.info("%s %s: %s", role, name, report)
    return model


def model_of(
    section: Mapping[str, Any], num_classes: int, *, role: str, weights: str | Path = ""
) -> Classifier:
    """Return the model of the section STUDENT or TEACHER, with the weights of a checkpoint if any.

    Args:
        section: names the model and its checkpoint.
        num_classes: classes of the data.
        role: "student" or "teacher": whose section it is.
        weights: checkpoint to load instead of the section's.

    Raises:
        ConfigError: as :func:`load_classifier`.
    """
    weights, given = weights or section["WEIGHTS"], {"role": role, **settings_of(section)}
    if weights:
        return load_classifier(section["NAME"], weights, num_classes, **given)
    return named_model(section["NAME"], num_classes, **given)


def classes_in(section: Mapping[str, Any], weights: str | Path, *, role: str) -> int:
    """Return the number of classes of the classifier in a checkpoint.

    Args:
        section: STUDENT or TEACHER: the checkpoint's model.
        weights: checkpoint.
        role: "student" or "teacher": which of the two to load if the file holds both.

    Raises:
        ConfigError: an unknown model, or a checkpoint that cannot be read.
    """
    model = named_model(section["NAME"], 2, role=role, **without_weights(section))
    try:
        report = load_weights(model, weights, role=role, allow_partial=True)
    except CheckpointError as error:
        raise ConfigError(f"{role.upper()}.WEIGHTS: {error}") from error
    # A classifier's shape differs from the one here in the first dimension, and only there.
    of_classes = [
        entry.in_file[0]
        for entry in report.mismatched
        if entry.in_model[:1] == (2,) and entry.in_file and entry.in_file[1:] == entry.in_model[1:]
    ]
    return of_classes[-1] if of_classes else 2


def _from_library(name: str, role: str) -> str:
    if not name.startswith(("torchvision/", "timm/")):
        return ""
    return f", or, without WEIGHTS, {role.upper()}.KWARGS '{{pretrained: true}}' (a new classifier)"


def _unread(name: str, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return keywords with which the weights of a model's library or folder are not loaded."""
    may_be_read = "pretrained" in kwargs or name.startswith("hf/")
    return {**kwargs, "pretrained": False} if may_be_read else kwargs


def _plain(value: Any) -> Any:
    """Convert nested mappings to dictionaries, because models keep their arguments."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
