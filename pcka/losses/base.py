"""Base classes of the losses, their inputs and their terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, final

from torch import Tensor, nn

from pcka.losses.checks import as_stages, as_weights, check_temperature, check_weights
from pcka.losses.heads import DenseHead, PixelHead, RegionHead
from pcka.losses.numerics import standardized_logits

T = TypeVar("T")


@dataclass(frozen=True)
class Outputs:
    """The outputs of one model on one batch.

    Args:
        logits: ``(B, P)`` class scores before the softmax, or None if the model returned none.
        features: tap name -> ``(B, C, H, W)`` or ``(B, D)``.
        indices: position of each sample in the training set, ``(B,)`` int64, or None if no loss
            needs it.
        raw: what the model returned; None if the batch was gathered from several processes.
        head: outputs of a detector's or segmenter's head, or None if no loss needs them.
    """

    logits: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    indices: Tensor | None = None
    raw: Any = None
    head: DenseHead | RegionHead | PixelHead | None = None

    def feature(self, name: str) -> Tensor:
        """The feature tapped under ``name``.

        Raises:
            ValueError: there is none; the message lists the tapped features.
        """
        if name not in self.features:
            raise ValueError(
                f"feature {name!r} is not among the tapped features "
                f"{sorted(self.features)}; add a tap of that name, or use one of these"
            )
        return self.features[name]


@dataclass(frozen=True)
class Context:
    """What a loss may need to know about the run beyond the outputs on a batch.

    Args:
        train_labels: class of each training image, ``(N,)`` int64.
        teacher_classifier: the teacher's last layer, pooled features ``(B, D_t)`` -> logits.
        teacher_norms: tap name -> weight and bias, ``(C_t,)`` each, of the batch norm that gives
            that feature of the teacher, for taps of features before their activation.
    """

    train_labels: Tensor | None = None
    teacher_classifier: nn.Module | None = None
    teacher_norms: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


NO_CONTEXT = Context()


class Term(NamedTuple):
    """One term of a loss.

    Attributes:
        weight: its factor in the training loss.
        value: a scalar with its autograd graph, without the factor.
    """

    weight: float | Tensor
    value: Tensor

    @property
    def weighted(self) -> Tensor:
        """``weight * value``."""
        return self.weight * self.value


class Loss(nn.Module):
    """A distillation or task loss: outputs of both models and the target -> named terms.

    A subclass implements :meth:`terms`. It takes keyword-only arguments, each with a default that
    YAML can represent, and declares what it needs in the attributes below. Parameters made in
    :meth:`prepare` are trained with the student; buffers are saved and restored.

    Attributes:
        taps: names of the features read from ``Outputs.features``.
        log_name: name of the terms, ``loss_<log_name>`` or ``loss_<log_name>_<stage>``; by default
            the class's name in lower case. Losses of one class that are used together need
            different names.
        needs_teacher: whether the loss needs the teacher's outputs.
        needs_target: whether it needs the target.
        refuses_soft_targets: why it cannot learn from mixed samples, whose targets are class
            probabilities ``(B, P)``; empty if it can.
        needs_logits: whether it needs the logits of each model that it reads.
        needs_indices: whether it needs ``student.indices``.
        needs_context: whether ``prepare`` needs a part of its ``context``.
        needs_boxes: whether its target is the boxes of the objects, ``(M, 5)``: the image's
            index, then x0, y0, x1, y1 as fractions of the width and height that the maps cover.
        needs_head: the type of ``Outputs.head`` that it needs from both models; None if it needs
            none.
        head_depth: number of convolutions of a dense head after which it reads the maps inside; 0
            if it reads none.
        capturable: whether it can be captured in a CUDA graph and replayed: it never waits for a
            tensor's value, and its only state is in buffers, which it updates in place.
        can_be_negative: whether a term of it can be negative, beyond rounding, so that its ratio to
            another term is no scale: ``pcka.Distiller(..., relative_to=...)`` refuses it.
        relational: whether it relates the samples of a batch to one another instead of averaging
            over them, so that with several processes it has to see all their batches.
        least_samples: fewest samples that it can compare, of all processes if it is relational.
        same_shape: whether it compares maps of the same shape. :class:`pcka.Distiller` makes their
            shapes equal: a trained 1x1 convolution brings the student's maps to the teacher's
            width, and pooling brings both to the smaller size.
    """

    taps: tuple[str, ...] = ()
    log_name: str = ""
    needs_teacher: bool = True
    needs_target: bool = False
    refuses_soft_targets: str = ""
    needs_logits: bool = False
    needs_indices: bool = False
    needs_context: bool = False
    needs_boxes: bool = False
    needs_head: type | None = None
    head_depth: int = 0
    capturable: bool = True
    can_be_negative: bool = False
    relational: bool = False
    least_samples: int = 1
    same_shape: bool = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "forward" in cls.__dict__:
            raise TypeError(f"{cls.__name__} defines forward(); a loss implements terms() instead")
        if "log_name" not in cls.__dict__:
            cls.log_name = cls.__name__.lower()

    @property
    def of_detectors(self) -> bool:
        """Whether it needs inputs that only detectors and their data provide."""
        return self.needs_boxes or self.needs_head is not None

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the parts whose size depends on the models (adapters), using a dry run of both.

        Called once, before the optimizer is created; most losses have nothing to prepare.

        Args:
            student: outputs of the student on any batch; only their shapes, dtypes and device
                matter.
            teacher: outputs of the teacher on the same batch, or None without a teacher.
            context: context of the run.
        """

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """The named terms, each with its weight.

        Args:
            student: outputs of the student.
            teacher: outputs of the teacher on the same samples; no gradient reaches them.
            target: the target of the task.

        Raises:
            ValueError: something that the loss needs is missing or cannot be compared.
        """
        raise NotImplementedError

    @final  # type: ignore[misc]  # nn.Module has an attribute of that name
    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Tensor]:
        """The :meth:`terms`, each a scalar multiplied by its weight."""
        return {name: t.weighted for name, t in self.terms(student, teacher, target).items()}

    def need(self, value: T | None, argument: str) -> T:
        """Return ``value``; if it is None, raise a ``ValueError`` naming the loss and argument."""
        if value is None:
            name = type(self).__name__
            raise ValueError(f"{argument}: {name} needs it, got None; pass it, or leave {name} out")
        return value


class StagewiseLoss(Loss):
    """``compare(student, teacher)`` for each stage: ``{"loss_<log_name>_<stage>"}``.

    Args:
        stages: names of the tapped features.
        weights: factor of each stage's term, or a single one for all.
    """

    def __init__(self, stages: Sequence[str], weights: float | Sequence[float]) -> None:
        super().__init__()
        self.taps = as_stages(stages)
        self.weights = as_weights(stages, weights)

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        """The loss on one stage's features, a scalar without its weight."""
        raise NotImplementedError

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """One term per stage."""
        return {
            f"loss_{self.log_name}_{stage}": Term(weight, self.compare(own, other, stage))
            for stage, weight, own, other in self.pairs(student, teacher)
        }

    def pairs(
        self, student: Outputs, teacher: Outputs | None
    ) -> Iterator[tuple[str, float, Tensor, Tensor]]:
        """Each stage with its weight and both models' features.

        Raises:
            ValueError: no teacher, or features of different shapes if the loss needs equal ones.
        """
        teacher = self.need(teacher, "teacher")
        for stage, weight in zip(self.taps, self.weights, strict=True):
            own, other = student.feature(stage), teacher.feature(stage)
            if self.same_shape and own.shape != other.shape:
                raise ValueError(
                    f"{stage}: {type(self).__name__} compares feature maps of the same shape "
                    f"(B, C, H, W), got student {tuple(own.shape)} and teacher "
                    f"{tuple(other.shape)}; pcka.Distiller adapts them after Distiller.prepare"
                )
            yield stage, weight, own, other


class LogitLoss(Loss):
    """``compare(student, teacher, target)`` on the logits: ``{"loss_<log_name>"}``.

    Args:
        weight: factor of the term.
        temperature: ``T > 0``, divides logits.
        standardize: compare the :func:`standardized_logits` of both models.
    """

    needs_logits = True

    def __init__(self, weight: float, temperature: float, *, standardize: bool = False) -> None:
        super().__init__()
        check_weights(weight=weight)
        check_temperature(temperature)
        self.weight = weight
        self.temperature = temperature
        self.standardize = standardize

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        """The loss on logits ``(B, P)``, a scalar without its weight."""
        raise NotImplementedError

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """The single term."""
        own = self.need(student.logits, "student.logits")
        other = self.need(self.need(teacher, "teacher").logits, "teacher.logits")
        if self.standardize:
            own, other = standardized_logits(own), standardized_logits(other)
        return {f"loss_{self.log_name}": Term(self.weight, self.compare(own, other, target))}
