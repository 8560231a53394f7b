"""Student, teacher, taps, adapters and losses in one module: a batch in, named loss terms out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pcka.distiller_checks import check_apart, check_gradients, check_losses, check_scalable
from pcka.distributed import gather_batch, gather_outputs, world_size
from pcka.losses.adapters import ModulesByTap, adapt, fit
from pcka.losses.base import NO_CONTEXT, Context, Loss, Outputs, Term
from pcka.losses.numerics import at_one_size
from pcka.modes import evaluation_mode
from pcka.taps import LogitsOf, Observer
from pcka.teacher import FrozenTeacher

Batch = tuple[Outputs, Outputs | None, Tensor | None]  # student, teacher, target
SMALLEST = 1e-6  # value of a term below which its scale factor stops growing


class Distiller(nn.Module):
    """Runs both models on a batch and returns the terms of all losses.

    The path of a feature: a tap reads it; if a loss compares maps of the same shape, the student's
    map goes through the tap's adapter to the teacher's width and both are pooled to the smaller
    size; if the loss is relational, the batches of all processes are gathered; the loss compares
    the two.

    The teacher is not registered as a submodule: it is in neither ``state_dict`` nor
    ``parameters``, but follows ``.to()``, ``.cuda()``, ``.half()``. It runs only if a loss needs
    it. Without ``compile``, features are tapped only during ``forward``, so the student carries no
    hooks between steps.

    With several processes (an initialised process group), wrap the distiller in
    ``DistributedDataParallel``, which averages the gradients.

    Args:
        student: the model to train, inputs -> logits ``(B, P)``, or an output that contains them.
        teacher: the trained model, with such an output; a plain module becomes a
            :class:`FrozenTeacher`. None if no loss needs one.
        losses: modules as in :mod:`pcka.losses`.
        taps: tap name -> (path in the student, path in the teacher), or one path for both, as
            :class:`pcka.FeatureTap` takes them.
        logits_of: where the logits are in the models' outputs, as for
            :func:`pcka.taps.find_logits`; a :class:`FrozenTeacher` has its own.
        relative_to: name of a term, such as ``"loss_ce"``. Each term ``L`` that needs the teacher
            is scaled to its current value before weighting: ``w sg(L_ref / L) L`` with the
            stop-gradient ``sg``, so that a weight means the same at any scale of its term. Losses
            that can be negative are refused. "": no scaling.
        gather: relational losses see the samples of all processes, whose features must have the
            same shape; False: each process compares only its own batch.
        compile: run the models through :func:`torch.compile`.

    Attributes:
        teacher_paths: tap name -> path in the teacher that the losses read.
        runs_teacher: whether a loss needs the teacher.
        adapters: tap name (with slashes for dots) -> 1x1 convolution from the student's width to
            the teacher's, if they differ and a loss compares maps of the same shape; created
            by :meth:`prepare`, shared by these losses.
        distillation_scale: factor on the terms of all losses that need a teacher, initially 1; a
            warm-up raises it from 0.
        taught_terms: names of the terms of these losses that were computed so far.

    Raises:
        ValueError: something is not a loss, a loss's tap is missing from ``taps``, a model lacks a
            path, a loss needs a teacher and there is none, a loss can be negative and terms are
            scaled, the teacher shares parameters or buffers with the student, or the student is in
            ``DistributedDataParallel`` and adapters or losses are also trained.
    """

    teacher: FrozenTeacher | None

    def __init__(
        self,
        student: nn.Module,
        teacher: FrozenTeacher | nn.Module | None,
        losses: Sequence[Loss],
        taps: Mapping[str, str | tuple[str, str]] = MappingProxyType({}),
        *,
        logits_of: LogitsOf | None = None,
        relative_to: str = "",
        gather: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__()
        check_losses(losses)
        check_scalable(losses, relative_to)
        check_apart(student, teacher)
        if isinstance(teacher, nn.Module) and not isinstance(teacher, FrozenTeacher):
            teacher = FrozenTeacher(teacher, logits_of=logits_of)
        self.student = student
        # Through __dict__, because assigning a module registers it as a submodule.
        self.__dict__["teacher"] = teacher
        self.losses = nn.ModuleList(losses)
        self.adapters = ModulesByTap()
        self.relative_to = relative_to
        self.gather = gather
        self.distillation_scale: float | Tensor = 1.0
        with_teacher = [loss for loss in losses if loss.needs_teacher]
        if with_teacher and teacher is None:
            raise ValueError(f"teacher: {type(with_teacher[0]).__name__} needs one, got None")
        self.runs_teacher = bool(with_teacher)
        self.taught_terms: set[str] = set()
        self._student_paths = _paths(losses, taps, 0)
        self.teacher_paths = _paths(with_teacher, taps, 1)
        self._observe_student = Observer(
            student, self._student_paths, logits_of=logits_of, compile=compile
        )
        check_gradients(self.student, [self.adapters, self.losses])
        self._observe_teacher = None
        if teacher is not None and with_teacher:
            self._observe_teacher = teacher.observer(self.teacher_paths, compile=compile)

    def observe_student(self, *inputs: Any) -> Outputs:
        """The student's outputs on its inputs, such as images ``(B, C, H, W)``."""
        return self._observe_student(*inputs)

    def observe_teacher(self, *inputs: Any) -> Outputs | None:
        """The teacher's outputs on its inputs; None if no loss needs them."""
        return None if self._observe_teacher is None else self._observe_teacher(*inputs)

    @torch.no_grad()
    def prepare(
        self, images: Any, teacher_images: Any = None, context: Context = NO_CONTEXT
    ) -> None:
        """Create the adapters, and let the losses create theirs, in a dry run of both models.

        Call it before creating the optimizer. The mode of each of the student's modules and its
        batch-norm statistics do not change.

        Args:
            images: two or more samples, as for :meth:`forward`.
            teacher_images: as for :meth:`forward`.
            context: what some losses need to know about the run.
        """
        with evaluation_mode(self.student):
            student = self.observe_student(images)
        teacher = self.observe_teacher(images if teacher_images is None else teacher_images)
        self.prepare_for(student, teacher, context)

    @torch.no_grad()
    def prepare_for(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Do what :meth:`prepare` does, with outputs that the caller already has.

        Raises:
            ValueError: a loss cannot compare the features, or something that it needs is missing.
        """
        losses = self._losses()
        for tap in _taps_of(loss for loss in losses if loss.same_shape):
            if teacher is None:
                raise ValueError("teacher: a loss compares its maps, got None; pass its outputs")
            own, other = student.feature(tap), teacher.feature(tap)
            at_one_size(own, other)  # refuses anything but maps
            widths = own.shape[1], other.shape[1]
            if widths[0] != widths[1]:
                self.adapters[tap] = fit(nn.Conv2d(*widths, 1), own)
        adapted = self.at_one_shape(student, teacher)
        for loss in losses:
            self._check_logits(loss, student, teacher)
            loss.prepare(*(adapted if loss.same_shape else (student, teacher)), context)
        check_gradients(self.student, [self.adapters, self.losses])

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """The terms of all losses, with their weights, on outputs that the caller already has.

        Args:
            student: as returned by :meth:`observe_student`.
            teacher: as returned by :meth:`observe_teacher`.
            target: as for :meth:`forward`.

        Returns:
            ``loss_...`` -> weight, including ``distillation_scale``, and scalar.

        Raises:
            ValueError: a loss returns no term, two return one of the same name, a loss needs logits
                and a model returned none, a loss refuses soft targets and got them, or there is no
                term ``relative_to``.
        """
        if teacher is not None:
            teacher = _cast_like(student, teacher)
        given = self._given_to_losses(student, teacher, target)
        terms: dict[str, Term] = {}
        for loss in self._losses():
            self._check_logits(loss, student, teacher)
            _check_target(loss, target)
            added = loss.terms(*given[self._way(loss)])
            _check_names(loss, added, terms)
            scale = self.distillation_scale if loss.needs_teacher else 1.0
            terms |= {name: Term(scale * weight, value) for name, (weight, value) in added.items()}
            if loss.needs_teacher:
                self.taught_terms |= added.keys()
        return self._at_one_scale(terms) if self.relative_to else terms

    def _at_one_scale(self, terms: dict[str, Term]) -> dict[str, Term]:
        """Scale the terms that need the teacher to the value of the term ``relative_to``."""
        if self.relative_to not in terms:
            raise ValueError(
                f"relative_to: no term {self.relative_to!r}; available: {', '.join(terms)}"
            )
        reference = terms[self.relative_to].value.detach()

        def scaled(term: Term) -> Term:
            value = term.value.detach()
            return Term(term.weight * reference / value.clamp(min=SMALLEST), term.value)

        return {name: scaled(t) if name in self.taught_terms else t for name, t in terms.items()}

    def forward(
        self,
        images: Any,
        target: Tensor | None,
        teacher_images: Any = None,
        *,
        indices: Tensor | None = None,
        teacher_outputs: Outputs | None = None,
    ) -> dict[str, Tensor]:
        """The weighted terms of all losses; their sum is the training loss.

        Args:
            images: ``(B, C, H, W)``, normalised for the student, or any other input of the model.
            target: what the losses compare with: ``(B,)`` class indices for cross-entropy, or
                ``(B, P)`` class probabilities for mixed samples (mixup, cutmix).
            teacher_images: ``(B, C, H', W')`` of the same samples, normalised for the teacher;
                ``images`` if None.
            indices: position of each sample in the training set, ``(B,)`` int64, for losses that
                remember samples.
            teacher_outputs: if they are already known (several students with one teacher), as
                returned by ``teacher.observer`` for ``teacher_paths``; the teacher then does not
                run.

        Returns:
            ``loss_...`` -> scalar, with a graph to the student, the adapters and the losses' own
            parameters.

        Raises:
            ValueError: as :meth:`terms`.
        """
        student = replace(self.observe_student(images), indices=indices)
        teacher = teacher_outputs
        if teacher is None:
            teacher = self.observe_teacher(images if teacher_images is None else teacher_images)
        terms = self.terms(student, teacher, target)
        return {name: term.weighted for name, term in terms.items()}

    def _losses(self) -> list[Loss]:
        return list(cast(Iterable[Loss], self.losses))

    def _way(self, loss: Loss) -> tuple[bool, bool]:
        """Whether a loss's inputs are brought to the same shape, and whether they are gathered."""
        return loss.same_shape, loss.relational and self.gather and world_size() > 1

    def _given_to_losses(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[tuple[bool, bool], Batch]:
        """The inputs of the losses, by the way they are prepared."""
        given: dict[tuple[bool, bool], Batch] = {}
        ways: dict[tuple[bool, bool], list[Loss]] = {}
        for loss in self._losses():
            ways.setdefault(self._way(loss), []).append(loss)
        adapted = self.at_one_shape(student, teacher)
        for way, losses in ways.items():
            at_one_shape, gathered = way
            given[way] = (*(adapted if at_one_shape else (student, teacher)), target)
            if gathered:
                given[way] = _gathered(*given[way], _taps_of(losses))
        return given

    def at_one_shape(
        self, student: Outputs, teacher: Outputs | None
    ) -> tuple[Outputs, Outputs | None]:
        """Both models' outputs, with the maps that losses compare brought to the same shape.

        The student's maps pass through their adapters, and if sizes differ both are pooled to the
        smaller one. This is what such losses see.

        Args:
            student: as returned by :meth:`observe_student`.
            teacher: as returned by :meth:`observe_teacher`.
        """
        taps = _taps_of(loss for loss in self._losses() if loss.same_shape)
        if not taps or teacher is None:
            return student, teacher
        own, other = dict(student.features), dict(teacher.features)
        for tap in taps:
            own[tap], other[tap] = self._match(tap, student.feature(tap), teacher.feature(tap))
        return replace(student, features=own), replace(teacher, features=other)

    def _match(self, tap: str, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Bring two maps to the same shape; those that already match keep the student's dtype."""
        if tap in self.adapters:
            own = adapt(self.adapters[tap], own)
        if own.shape[2:] != other.shape[2:]:
            own, other = at_one_size(own, other)
        return own, other.to(own.dtype)

    def _check_logits(self, loss: Loss, student: Outputs, teacher: Outputs | None) -> None:
        """Refuse models whose outputs contain no logits if the loss needs them."""
        if not loss.needs_logits:
            return
        models = [("student", self.student, student)]
        if loss.needs_teacher and self.teacher is not None and teacher is not None:
            models.append(("teacher", self.teacher.model, teacher))
        for role, model, outputs in models:
            if not isinstance(outputs.logits, Tensor):
                raise ValueError(
                    f"{role}: {type(loss).__name__} needs logits (B, P), but none were found in "
                    f"what {type(model).__name__} returned ({type(outputs.raw).__name__}); pass "
                    "their key, their attribute or a function that finds them as logits_of"
                )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load as any module does; the error says how to create parts that do not exist yet.

        Raises:
            ValueError: ``strict``, and the state has adapters or parts of losses that are missing
                here.
            RuntimeError: as for any module.
        """
        more = sorted(state_dict.keys() - self.state_dict().keys())
        if strict and (parts := [n for n in more if n.startswith(("adapters.", "losses."))]):
            raise ValueError(
                f"state_dict: the distiller has no {parts[0]!r}; give it the same losses and "
                "taps as the state, and call prepare() with a batch before loading"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def _replicate_for_data_parallel(self) -> Self:
        """Refuse ``nn.DataParallel``, which calls this for each device."""
        raise ValueError(
            "DataParallel does not copy the teacher to its devices; start one process per device "
            "with torchrun, and wrap the distiller in DistributedDataParallel"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every move and cast of a module goes through here: take the teacher along."""
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return self


def _taps_of(losses: Iterable[Loss]) -> list[str]:
    return list(dict.fromkeys(tap for loss in losses for tap in loss.taps))


def _gathered(
    student: Outputs, teacher: Outputs | None, target: Tensor | None, taps: Sequence[str]
) -> Batch:
    """The batch of all processes."""
    return (
        gather_outputs(student, taps),
        None if teacher is None else gather_outputs(teacher, taps),
        None if target is None else gather_batch(target),
    )


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
    return replace(teacher, logits=logits, features=features)


def _check_target(loss: Loss, target: Tensor | None) -> None:
    """Refuse class probabilities if a loss cannot learn from mixed samples."""
    reason = loss.refuses_soft_targets
    if reason and target is not None and target.dim() == 2 and target.is_floating_point():
        name = type(loss).__name__
        raise ValueError(
            f"target: {name} cannot use mixed samples with class probabilities (B, P): {reason}; "
            f"do not mix, or leave {name} out"
        )


def _check_names(loss: Loss, added: Mapping[str, Term], terms: Mapping[str, Term]) -> None:
    name = type(loss).__name__
    if not added:
        raise ValueError(f"losses: {name} gives no term; check its settings, or leave it out")
    if twice := terms.keys() & added.keys():
        raise ValueError(
            f"losses: {name} gives {', '.join(sorted(twice))}, as another loss already does; "
            "keep only one, or give one a different log_name"
        )


def _paths(
    losses: Iterable[Loss], taps: Mapping[str, str | tuple[str, str]], side: int
) -> dict[str, str]:
    """Tap name -> path in the student (``side`` 0) or teacher (1), of the taps that losses read."""
    paths = {}
    for loss in losses:
        for name in loss.taps:
            if name not in taps:
                raise ValueError(
                    f"taps: {type(loss).__name__} needs the tap {name!r}, got "
                    f"{sorted(taps)}; add {name!r}: (student path, teacher path)"
                )
            given = taps[name]
            pair = (given, given) if isinstance(given, str) else tuple(given)
            if len(pair) != 2:
                raise ValueError(
                    f"taps: {name!r} must be (student path, teacher path) or one path for both, "
                    f"got {given!r}"
                )
            paths[name] = pair[side]
    return paths
