"""What of student and teacher is tapped under which name, and what losses know of the models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from classification.models.registry import Classifier
from pcka import losses
from pcka.engine.config import ConfigError
from pcka.modes import evaluation_mode

Taps = dict[str, tuple[str, str]]

SIDE = 224  # pixels of the images that models are tried on; all of torchvision's take them


def model_taps(student: Classifier, teacher: Classifier, extra: list[list[str]]) -> Taps:
    """Return tap name -> (student path, teacher path).

    ``stage{i}`` and ``stage{i}_preact``, after and before the activation, ``i`` counting the
    student's stages from the stem, 0; ``last`` and ``last_preact``; ``pooled``. Models with
    different numbers of stages are aligned at their last ones.

    Args:
        student: of ``classification.models``.
        teacher: likewise.
        extra: ``DISTILL.TAPS``, see :func:`extra_taps`.

    Raises:
        ConfigError: an entry of ``extra`` that is no triple.
    """
    taps: Taps = {}
    _add_stages(taps, student.stage_names, teacher.stage_names, "")
    _add_stages(taps, student.preactivation_names, teacher.preactivation_names, "_preact")
    if student.pooled_name and teacher.pooled_name:
        taps["pooled"] = (student.pooled_name, teacher.pooled_name)
    return taps | extra_taps(extra)


def extra_taps(entries: list[list[str]]) -> Taps:
    """Return ``DISTILL.TAPS``, triples, as tap name -> (student path, teacher path).

    Raises:
        ConfigError: an entry that is no triple.
    """
    taps: Taps = {}
    for entry in entries:
        if not isinstance(entry, list | tuple) or len(entry) != 3:
            raise ConfigError(
                "DISTILL.TAPS: expected [name, path in the student, path in the teacher] for each "
                f"tap, got {entry!r}"
            )
        name, student, teacher = map(str, entry)
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


def proposed_taps(student: Classifier, teacher: Classifier) -> str:
    """Say which DISTILL.TAPS would do: the last module of each resolution."""
    ours, theirs = (model.stage_names or resolution_ends(model) for model in (student, teacher))
    shared = min(len(ours), len(theirs))
    if not shared:
        return ". model.named_modules() lists the modules' paths"
    pairs = list(zip(ours[-shared:], theirs[-shared:]))
    named = [(f"stage{index}", pair) for index, pair in enumerate(pairs)] + [("last", pairs[-1])]
    entries = ", ".join(f"[{name}, {s}, {t}]" for name, (s, t) in named)
    return f'. By the models\' resolutions, for example: DISTILL.TAPS "[{entries}]"'


def loss_context(
    teacher: Classifier,
    norms: Mapping[str, tuple[Tensor, Tensor]],
    taps: Taps,
    train_labels: Tensor,
) -> losses.Context:
    """Return what losses may need to know of the run.

    Args:
        teacher: the teacher's model.
        norms: module path -> weight and bias of its batch norms before their folding.
        taps: of :func:`model_taps`.
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


class _Call(NamedTuple):
    path: str
    output: Tensor
    version: int


def resolution_ends(model: nn.Module) -> tuple[str, ...]:
    """Return the path of the module that gives the last map of each resolution, in order.

    Of modules within one another the outermost counts, of one after the other the last; only what
    a tap can read: square maps of more than a pixel, of modules that run once, not overwritten.

    Args:
        model: images ``(B, 3, H, W)`` -> anything; it is run once and stays as it is.

    Returns:
        Paths, empty where the model takes no images of this kind.
    """
    calls: list[_Call] = []
    handles = [
        module.register_forward_hook(partial(_keep, calls, path))
        for path, module in model.named_modules()
        if path
    ]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(torch.zeros(1, 3, SIDE, SIDE, device=device))
    except Exception:  # a proposal is all that is lost
        return ()
    finally:
        for handle in handles:
            handle.remove()
    paths = [call.path for call in calls]
    ends: dict[int, str] = {}
    for call in calls:
        height, width = call.output.shape[2:]
        whole = call.output._version == call.version and paths.count(call.path) == 1
        # A module deeper inside may belong to the next resolution, before it halves its input.
        deeper = height in ends and call.path.count(".") > ends[height].count(".")
        if whole and height == width > 1 and not deeper:
            ends[height] = call.path
    return tuple(ends[side] for side in sorted(ends, reverse=True))


def _keep(calls: list[_Call], path: str, _: nn.Module, inputs: object, output: object) -> None:
    if isinstance(output, Tensor) and output.dim() == 4:
        calls.append(_Call(path, output, output._version))
