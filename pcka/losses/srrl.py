"""SRRL: features that the teacher's classifier reads as its own (Yang et al., ICLR 2021)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from pcka.losses.adapters import adapt, fit, pointwise, prepared
from pcka.losses.base import NO_CONTEXT, Context, Loss, Outputs, Term
from pcka.losses.checks import WHERE_MAPS_ARE, as_samples, check_weights, unlike
from pcka.ops.reference import accumulation_dtype, without_autocast


def srrl_loss(
    student: Tensor,
    teacher: Tensor,
    classifier: Callable[[Tensor], Tensor],
    *,
    feature_weight: float = 1.0,
    regression_weight: float = 1.0,
) -> Tensor:
    r"""Feature matching and softmax regression, both as mean squared differences.

    ``w_f mean((f_s - f_t)^2) + w_r mean((c(f_s) - c(f_t))^2)`` with ``f`` the pooled features and
    ``c`` the teacher's classifier (Yang et al. 2021, section 3; the form of both terms and their
    weights of 1 as in the authors' public code).

    Args:
        student: ``(B, D)``, adapted to the teacher's width, any floating dtype.
        teacher: ``(B, D)``, same device; no gradient reaches it.
        classifier: ``(B, D)`` in float32, or in float64 for float64 input -> logits ``(B, P)``.
        feature_weight: ``w_f``, factor of the features' part.
        regression_weight: ``w_r``, factor of the logits' part.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: features that differ in shape or device.
    """
    student, teacher = as_samples(student, teacher)
    if student.shape != teacher.shape:
        wanted = "pooled features of one shape (B, D)"
        way_out = "Adapt the width with a 1x1 convolution before the pooling"
        raise unlike(student.shape, teacher.shape, wanted, way_out)
    with without_autocast(student.device):
        regression = F.mse_loss(classifier(student), classifier(teacher))
    return feature_weight * F.mse_loss(student, teacher) + regression_weight * regression


class SRRL(Loss):
    """:func:`srrl_loss` of the student's last map: ``{"loss_srrl"}``.

    A trained connector (1x1 convolution, batch norm, ReLU) brings the map to the teacher's width.
    The teacher's classifier is a frozen copy that is not registered as a submodule: it is in
    neither ``state_dict`` nor ``parameters``, but follows ``.to()``.

    Args:
        stage: name of the student's tapped map; from the teacher, the features tapped as ``pooled``
            are used, the input of its classifier.
        feature_weight, regression_weight: of :func:`srrl_loss`.
    """

    classifier: nn.Module | None = None

    needs_context = True

    def __init__(
        self,
        *,
        stage: str = "last",
        feature_weight: float = 1.0,
        regression_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_weights(feature_weight=feature_weight, regression_weight=regression_weight)
        self.taps = (stage, "pooled")
        self.feature_weight = feature_weight
        self.regression_weight = regression_weight
        self.connector: nn.Sequential | None = None

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the connector, and copy the teacher's classifier.

        Raises:
            ValueError: no teacher, no ``context.teacher_classifier``, or a stage that is not a map.
        """
        pooled = self.need(teacher, "teacher").feature("pooled")
        classifier = self.need(context.teacher_classifier, "context.teacher_classifier")
        feature = student.feature(self.taps[0])
        if feature.dim() != 4:
            raise ValueError(
                f"stage must name a feature map (B, C, H, W) of the student; {self.taps[0]!r} has "
                f"{tuple(feature.shape)}. {WHERE_MAPS_ARE}"
            )
        connector = pointwise(feature.shape[1], pooled.shape[1], norm=True, relu=True)
        nn.init.kaiming_normal_(next(connector.parameters()), mode="fan_out")
        self.connector = fit(connector, feature)
        frozen = copy.deepcopy(classifier).requires_grad_(False).eval()
        # Through __dict__, because assigning a module registers it as a submodule.
        self.__dict__["classifier"] = fit(frozen, feature)

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """One term for feature matching and regression, which carry their own weights."""
        teacher = self.need(teacher, "teacher")
        connector, classifier = prepared(self.connector, "SRRL"), prepared(self.classifier, "SRRL")
        connected = adapt(connector, student.feature(self.taps[0]))
        loss = srrl_loss(
            connected.to(accumulation_dtype(connected.dtype)).mean((2, 3)),
            teacher.feature("pooled"),
            classifier,
            feature_weight=self.feature_weight,
            regression_weight=self.regression_weight,
        )
        return {f"loss_{self.log_name}": Term(1.0, loss)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Include the classifier: every move and cast of a module goes through here."""
        super()._apply(fn, recurse)
        if self.classifier is not None:
            self.classifier._apply(fn, recurse)
        return self
