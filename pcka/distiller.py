"""Student, teacher and losses in one module: a batch in, named loss terms out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pcka.distributed import gather_batch, gather_outputs, world_size
from pcka.losses import Context, Loss, Outputs
from pcka.losses.base import NO_CONTEXT
from pcka.modes import evaluation_mode
from pcka.observer import Observer
from pcka.teacher import FrozenTeacher


class Distiller(nn.Module):
    """Runs both models on a batch and gives the terms of every loss.

    The teacher is held beside the module, not in it: it is in neither ``state_dict`` nor
    ``parameters``, but follows ``.to()``, ``.cuda()``, ``.half()``. It runs only where a loss
    needs it. Features are tapped during ``forward`` alone, so the student carries no hooks
    between steps.

    In several processes (an initialised process group) relational losses see the samples of all
    of them; wrap the distiller in ``DistributedDataParallel``, which averages the gradients.

    Args:
        student: the model to train, images -> logits ``(B, P)``.
        teacher: the trained model, images -> logits; a plain module becomes a
            :class:`FrozenTeacher`. None where no loss needs one.
        losses: modules as in :mod:`pcka.losses`.
        taps: tap name -> (module path in the student, module path in the teacher).
        compile: run the models through :func:`torch.compile`.

    Attributes:
        teacher_paths: tap name -> module path of what the losses read of the teacher.
        runs_teacher: a loss needs the teacher.
        distillation_scale: factor of the terms of all losses that need a teacher, 1 from the
            start; a warm-up raises it from 0.

    Raises:
        ValueError: a loss whose tap is missing from ``taps``, a path that a model lacks, a loss
            that needs a teacher without one, or a teacher that shares parameters or buffers with
            the student.
    """

    teacher: FrozenTeacher | None

    def __init__(
        self,
        student: nn.Module,
        teacher: FrozenTeacher | nn.Module | None,
        losses: Sequence[Loss],
        taps: Mapping[str, tuple[str, str]] = MappingProxyType({}),
        *,
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_apart(student, teacher)
        if isinstance(teacher, nn.Module) and not isinstance(teacher, FrozenTeacher):
            teacher = FrozenTeacher(teacher)
        self.student = student
        # Through __dict__, because assigning a module registers it as a submodule.
        self.__dict__["teacher"] = teacher
        self.losses = nn.ModuleList(losses)
        self.distillation_scale: float | Tensor = 1.0
        with_teacher = [loss for loss in losses if loss.needs_teacher]
        if with_teacher and teacher is None:
            raise ValueError(f"teacher: {type(with_teacher[0]).__name__} needs one, got None")
        self.runs_teacher = bool(with_teacher)
        self._student_paths = {name: taps[name][0] for name in _needed_taps(losses, taps)}
        self.teacher_paths = {name: taps[name][1] for name in _needed_taps(with_teacher, taps)}
        self._observe_student = Observer(student, self._student_paths, compile=compile)
        self._observe_teacher: Observer | None = None
        if teacher is not None:
            self._observe_teacher = teacher.observer(self.teacher_paths, compile=compile)

    @torch.no_grad()
    def prepare(
        self, images: Tensor, teacher_images: Tensor | None = None, context: Context = NO_CONTEXT
    ) -> None:
        """Let the losses size their adapters by a dry run; call it before making the optimizer.

        The mode of each of the student's modules and its batch-norm statistics stay as they are.

        Args:
            images: two or more samples, as for :meth:`forward`.
            teacher_images: as for :meth:`forward`.
            context: what some losses need to know of the run.
        """
        with evaluation_mode(self.student):
            student = self._observe_student(images)
        teacher = self.observe_teacher(images if teacher_images is None else teacher_images)
        self._check_logits(student, teacher)
        for loss in cast(Iterable[Loss], self.losses):
            loss.prepare(student, teacher, context)

    def observe_teacher(self, images: Tensor) -> Outputs | None:
        """The teacher's outputs on its images ``(B, C, H', W')``; None where no loss needs them."""
        if self._observe_teacher is None or not self.runs_teacher:
            return None
        return self._observe_teacher(images)

    def forward(
        self,
        images: Tensor,
        target: Tensor | None,
        teacher_images: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        teacher_outputs: Outputs | None = None,
    ) -> dict[str, Tensor]:
        """The weighted terms of all losses; their sum is what to train on.

        Args:
            images: ``(B, C, H, W)``, normalised for the student.
            target: what the losses compare with, ``(B,)`` class indices for cross-entropy.
            teacher_images: ``(B, C, H', W')`` of the same samples, normalised for the teacher;
                ``images`` where None.
            indices: position of each sample in the training set, ``(B,)`` int64, for losses that
                remember samples.
            teacher_outputs: where they are known already (several students on one teacher), as
                ``teacher.observer`` gives them for ``teacher_paths``; the teacher does not run
                then.

        Returns:
            ``loss_...`` -> scalar, with a graph to the student and to the losses' own parameters.

        Raises:
            ValueError: two losses give a term of the same name, or a model gives no tensor.
        """
        student = replace(self._observe_student(images), indices=indices)
        teacher = teacher_outputs
        if teacher is None:
            teacher = self.observe_teacher(images if teacher_images is None else teacher_images)
        self._check_logits(student, teacher)
        if teacher is not None:
            teacher = _cast_like(student, teacher)
        own = student, teacher, target
        gathered = self._gather(*own)
        terms: dict[str, Tensor] = {}
        for loss in self.losses:
            added = loss(*(gathered if loss.relational else own))
            if twice := terms.keys() & added.keys():
                raise ValueError(
                    f"losses: {type(loss).__name__} gives {', '.join(sorted(twice))}, which "
                    "another loss gives already; keep one of the two"
                )
            scale = self.distillation_scale if loss.needs_teacher else 1.0
            terms.update({name: scale * term for name, term in added.items()})
        return terms

    def _check_logits(self, student: Outputs, teacher: Outputs | None) -> None:
        """Refuse models that return a dict, a tuple or an object of their own."""
        wrapped = None if self.teacher is None else self.teacher.model
        for role, model, outputs in (
            ("student", self.student, student),
            ("teacher", wrapped, teacher),
        ):
            logits = None if outputs is None else outputs.logits
            if not (logits is None or isinstance(logits, Tensor)):
                raise ValueError(
                    f"{role}: {type(model).__name__} returned {type(logits).__name__}, expected "
                    "its logits, a tensor (B, P); pass a module whose forward() returns the "
                    "tensor alone, such as model(images).logits or model(images)['logits']"
                )

    def _gather(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> tuple[Outputs, Outputs | None, Tensor | None]:
        """What relational losses are called with: the batch of all processes."""
        relational = [loss for loss in cast(Iterable[Loss], self.losses) if loss.relational]
        if world_size() == 1 or not relational:
            return student, teacher, target
        taps = _needed_taps(relational, self._student_paths)
        return (
            gather_outputs(student, taps),
            None if teacher is None else gather_outputs(teacher, taps),
            None if target is None else gather_batch(target),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every move and cast of a module goes through here: take the teacher along."""
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return self


def _cast_like(student: Outputs, teacher: Outputs) -> Outputs:
    """The teacher's outputs in the student's dtypes, which differ under autocast."""
    logits = teacher.logits
    if logits is not None and student.logits is not None:
        logits = logits.to(student.logits.dtype)
    features = {
        name: teacher.features[name].to(feature.dtype)
        for name, feature in student.features.items()
        if name in teacher.features
    }
    return Outputs(logits=logits, features=features)


def _needed_taps(losses: Iterable[Loss], taps: Mapping[str, object]) -> list[str]:
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
    """Refuse what shares tensors: one cannot be frozen and the other trained."""
    if teacher is None:
        return
    kinds: tuple[tuple[str, Callable[[nn.Module], Iterable[Tensor]], str], ...] = (
        ("parameters", nn.Module.parameters, "freezing it would freeze both"),
        ("buffers", nn.Module.buffers, "training the student would change both"),
    )
    for kind, tensors_of, consequence in kinds:
        trained = {id(tensor) for tensor in tensors_of(student)}
        if any(id(tensor) in trained for tensor in tensors_of(teacher)):
            raise ValueError(
                f"teacher shares {kind} with student, and {consequence}; "
                "pass copy.deepcopy(teacher)"
            )
