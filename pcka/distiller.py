"""Student, teacher and losses in one module: a batch in, named loss terms out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn
from typing_extensions import Self

from pcka.losses import Loss, Outputs
from pcka.taps import FeatureTap
from pcka.teacher import FrozenTeacher


class Distiller(nn.Module):
    """Runs both models on a batch and gives the terms of every loss.

    The teacher is held beside the module, not in it: it is in neither ``state_dict`` nor
    ``parameters``, but follows ``.to()``, ``.cuda()``, ``.half()``. It runs only where a loss
    needs it. Features are tapped during ``forward`` alone, so the student carries no hooks
    between steps.

    Args:
        student: the model to train, images -> logits ``(B, P)``.
        teacher: the trained model, images -> logits; a plain module becomes a
            :class:`FrozenTeacher`. None where no loss needs one.
        losses: modules as in :mod:`pcka.losses`.
        taps: tap name -> (module path in the student, module path in the teacher).

    Raises:
        ValueError: a loss whose tap is missing from ``taps``, a path that a model lacks, a loss
            that needs a teacher without one, or a teacher that shares parameters with the student.
    """

    teacher: FrozenTeacher | None

    def __init__(
        self,
        student: nn.Module,
        teacher: FrozenTeacher | nn.Module | None,
        losses: Sequence[Loss],
        taps: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        _check_apart(student, teacher)
        if isinstance(teacher, nn.Module) and not isinstance(teacher, FrozenTeacher):
            teacher = FrozenTeacher(teacher)
        self.student = student
        # Through __dict__, because assigning a module registers it as a submodule.
        self.__dict__["teacher"] = teacher
        self.losses = nn.ModuleList(losses)
        with_teacher = [loss for loss in losses if loss.needs_teacher]
        if with_teacher and teacher is None:
            raise ValueError(f"teacher: {type(with_teacher[0]).__name__} needs one, got None")
        self._runs_teacher = bool(with_teacher)
        self._student_paths = {name: taps[name][0] for name in _needed_taps(losses, taps)}
        self._teacher_paths = {name: taps[name][1] for name in _needed_taps(with_teacher, taps)}
        self._check_paths()

    def forward(
        self, images: Tensor, target: Tensor | None, teacher_images: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms of all losses; their sum is what to train on.

        Args:
            images: ``(B, C, H, W)``, normalised for the student.
            target: what the losses compare with, ``(B,)`` class indices for cross-entropy.
            teacher_images: ``(B, C, H', W')`` of the same samples, normalised for the teacher;
                ``images`` where None.

        Returns:
            ``loss_...`` -> scalar, with a graph to the student and to the losses' own parameters.

        Raises:
            ValueError: two losses give a term of the same name.
        """
        student = _observe(self.student, self.student, self._student_paths, images)
        teacher = None
        if self.teacher is not None and self._runs_teacher:
            images = images if teacher_images is None else teacher_images
            observed = _observe(self.teacher, self.teacher.model, self._teacher_paths, images)
            teacher = _cast_like(student, observed)
        terms: dict[str, Tensor] = {}
        for loss in self.losses:
            added = loss(student, teacher, target)
            if twice := terms.keys() & added.keys():
                raise ValueError(
                    f"losses: {type(loss).__name__} gives {', '.join(sorted(twice))}, which "
                    "another loss gives already; keep one of the two"
                )
            terms.update(added)
        return terms

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every move and cast of a module goes through here: take the teacher along."""
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return self

    def _check_paths(self) -> None:
        FeatureTap(self.student, self._student_paths).remove()
        if self.teacher is not None:
            FeatureTap(self.teacher.model, self._teacher_paths).remove()


def _observe(
    model: Callable[[Tensor], Tensor], tapped: nn.Module, paths: Mapping[str, str], images: Tensor
) -> Outputs:
    with FeatureTap(tapped, paths) as tap:
        logits = model(images)
        return Outputs(logits, tap.pop())


def _cast_like(student: Outputs, teacher: Outputs) -> Outputs:
    """The teacher's outputs in the student's dtypes, which differ under autocast."""
    logits = teacher.logits
    if logits is not None and student.logits is not None:
        logits = logits.to(student.logits.dtype)
    features = {
        name: feature.to(student.features[name].dtype) for name, feature in teacher.features.items()
    }
    return Outputs(logits=logits, features=features)


def _needed_taps(losses: Sequence[Loss], taps: Mapping[str, tuple[str, str]]) -> list[str]:
    needed = []
    for loss in losses:
        for name in loss.taps:
            if name not in taps:
                raise ValueError(
                    f"taps: {type(loss).__name__} needs the tap {name!r}, there are "
                    f"{sorted(taps)}; add {name!r}: (student path, teacher path)"
                )
            needed.append(name)
    return list(dict.fromkeys(needed))


def _check_apart(student: nn.Module, teacher: nn.Module | None) -> None:
    """Freezing a teacher that shares parameters with the student would freeze the student."""
    if teacher is None:
        return
    trained = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in trained for parameter in teacher.parameters()):
        raise ValueError(
            "teacher shares parameters with student, and freezing it would freeze both; "
            "pass copy.deepcopy(teacher)"
        )
