"""Names and paths of the taps of student and teacher, and what losses know about the models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from classification.models.registry import Classifier
from pcka import losses
from pcka.engine.config import ConfigError
from pcka.modes import evaluation_mode
from pcka.taps import FeatureTap

Taps = dict[str, tuple[str, str]]


def model_taps(student: Classifier, teacher: Classifier, extra: list[list[str]]) -> Taps:
    """Return tap name -> (student path, teacher path).

    The names are ``stage{i}`` and ``stage{i}_preact``, after and before the activation, where ``i``
    counts the student's stages from 0, the stem; ``last`` and ``last_preact``; and ``pooled``.
    Models with different numbers of stages are aligned at their last stages.

    Args:
        student: model of ``classification.models``, with its stages (:func:`with_stages`).
        teacher: likewise.
        extra: ``DISTILL.TAPS``, see :func:`extra_taps`.

    Raises:
        ConfigError: an entry of ``extra`` is not a triple.
    """
    taps: Taps = {}
    _add_stages(taps, student.stage_names, teacher.stage_names, "")
    _add_stages(taps, student.preactivation_names, teacher.preactivation_names, "_preact")
    if student.pooled_name and teacher.pooled_name:
        taps["pooled"] = (student.pooled_name, teacher.pooled_name)
    return taps | extra_taps(extra)


def with_stages(model: Classifier, side: int, *, checked: bool = False) -> Classifier:
    """Return the model; if it does not name its stages, they are found by a dry run.

    Args:
        model: model of ``classification.models``.
        side: side of its input images, pixels.
        checked: check that a model without named stages accepts such images.

    Raises:
        ValueError: ``checked``, and it does not accept them.
    """
    if model.stage_names:
        return model
    from classification.models.stage_search import check_size, find_stages  # most name theirs

    if checked:
        check_size(model, side)
    return find_stages(model, side)


class Reading(NamedTuple):
    """What a tap reads on noise images.

    Attributes:
        shape: "C x H x W".
        is_signed: it has negative values, so it is not the output of a ReLU.
    """

    shape: str
    is_signed: bool


@torch.no_grad()
def read_taps(model: Classifier, paths: Mapping[str, str], side: int) -> dict[str, Reading]:
    """Return tap name -> what it reads on noise images of ``side`` pixels."""
    noise = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with evaluation_mode(model), FeatureTap(model, paths) as tap:
        model(noise.to(next(model.parameters()).device))
        return {
            name: Reading(" x ".join(map(str, x.shape[1:])), bool((x < 0).any()))
            for name, x in tap.pop().items()
        }


def unlike_signs(student: Mapping[str, Reading], teacher: Mapping[str, Reading]) -> list[str]:
    """Describe taps that lie after an activation in one model and before it in the other.

    Args:
        student: tap name -> reading.
        teacher: likewise, for the same names.
    """
    notes = []
    for role, own, other in (("student", student, teacher), ("teacher", teacher, student)):
        found = [name for name in own if own[name].is_signed and not other[name].is_signed]
        if found:
            notes.append(f"{', '.join(found)}: below zero in the {role} only")
    return notes


def extra_taps(entries: list[list[str]]) -> Taps:
    """Return ``DISTILL.TAPS``, triples, as tap name -> (student path, teacher path).

    Raises:
        ConfigError: an entry is not a triple, or has the name of another.
    """
    taps: Taps = {}
    for entry in entries:
        if not isinstance(entry, list | tuple) or len(entry) != 3:
            raise ConfigError(
                "DISTILL.TAPS: expected [name, path in the student, path in the teacher] for each "
                f"tap, got {entry!r}"
            )
        name, student, teacher = map(str, entry)
        if name in taps:
            raise ConfigError(f"DISTILL.TAPS: {name!r} is named twice; give each tap its own name")
        taps[name] = (student, teacher)
    return taps


def _add_stages(
    taps: Taps, student: tuple[str, ...], teacher: tuple[str, ...], suffix: str
) -> None:
    if not student or not teacher:
        return
    ahead = len(teacher) - len(student)
    for index, path in enumerate(student):
        if index + ahead >= 0:
            taps[f"stage{index}{suffix}"] = (path, teacher[index + ahead])
    taps[f"last{suffix}"] = (student[-1], teacher[-1])


def loss_context(
    teacher: Classifier,
    norms: Mapping[str, tuple[Tensor, Tensor]],
    taps: Taps,
    train_labels: Tensor,
) -> losses.Context:
    """Return what losses may need to know about the run.

    Args:
        teacher: the teacher's model.
        norms: path of a batch norm -> its weight and bias before folding.
        taps: from :func:`model_taps`.
        train_labels: (N,) int64.
    """
    norm_paths = dict(zip(teacher.preactivation_names, teacher.preactivation_norms))
    by_tap = {name: norm_paths.get(path, "") for name, (_, path) in taps.items()}
    classifier = teacher.classifier_name
    return losses.Context(
        train_labels=train_labels,
        teacher_classifier=teacher.get_submodule(classifier) if classifier else None,
        teacher_norms={name: norms[path] for name, path in by_tap.items() if path in norms},
    )
