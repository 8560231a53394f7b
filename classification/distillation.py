"""From the configuration to the losses, the taps and the pixel statistics of a distillation."""

from __future__ import annotations

from collections.abc import Mapping

from fvcore.common.config import CfgNode
from torch import Tensor

from classification.data import PixelNormalize
from classification.models import Classifier
from classification.stage_search import resolution_ends
from classification.weights import named_model
from pcka import losses
from pcka.engine.config import ConfigError
from pcka.engine.distill import UntappedError, build_losses

Taps = dict[str, tuple[str, str]]


def losses_of(cfg: CfgNode, taps: Taps) -> list[losses.Loss]:
    """Return the losses of a configuration, see :func:`pcka.engine.distill.build_losses`.

    Args:
        cfg: ``DISTILL`` and ``TEACHER.NAME`` are read.
        taps: what the losses may name as stages.

    Raises:
        ConfigError: as there, or a loss that needs a teacher where there is none.
    """

    def unfit(loss: losses.Loss) -> str | None:
        if not loss.needs_teacher or cfg.TEACHER.NAME:
            return None
        return (
            "needs a teacher and TEACHER.NAME is empty; name one, with its TEACHER.WEIGHTS or "
            "with TEACHER.TRAIN True"
        )

    return build_losses(cfg.DISTILL.METHODS, cfg.DISTILL, taps, unfit=unfit)


def model_taps(student: Classifier, teacher: Classifier, extra: list[list[str]]) -> Taps:
    """Return tap name -> (student path, teacher path).

    ``stage{i}`` and ``stage{i}_preact``, after and before the activation, ``i`` counting the
    student's stages from the stem, 0; ``last`` and ``last_preact``; ``pooled``. Models with
    different numbers of stages are aligned at their last ones.

    Args:
        student: of ``classification.models``.
        teacher: likewise.
        extra: ``DISTILL.TAPS``, triples of name, student path and teacher path.

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


def check_losses(cfg: CfgNode) -> None:
    """Refuse what the losses would refuse, before data is read or a teacher trained.

    Raises:
        ConfigError: as :func:`build_losses` does; where taps are missing, it proposes them.
    """
    student = named_model(cfg.STUDENT.NAME, 2, role="student")
    teacher = named_model(cfg.TEACHER.NAME, 2, role="teacher") if cfg.TEACHER.NAME else student
    try:
        losses_of(cfg, model_taps(student, teacher, cfg.DISTILL.TAPS))
    except UntappedError as error:
        raise ConfigError(f"{error}{_proposal(student, teacher)}") from None


def _proposal(student: Classifier, teacher: Classifier) -> str:
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


def pixel_statistics(role: CfgNode) -> PixelNormalize:
    """Return the normalisation of the section STUDENT or TEACHER."""
    return PixelNormalize(role.PIXEL_MEAN, role.PIXEL_STD)
