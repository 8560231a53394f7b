"""FitNet: imitate the teacher's features value by value (Romero et al., ICLR 2015)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcka.losses.adapters import ModulesByTap, adapt, fit, prepared, regressor
from pcka.losses.base import NO_CONTEXT, Context, Outputs, StagewiseLoss
from pcka.losses.checks import as_maps


def fitnet_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference of two feature maps, ``mean((X_s - X_t)^2)``.

    Romero et al. 2015, equation 3, without its factor 1/2 and after its regressor, as in Tian et
    al. 2020.

    Args:
        student: ``(B, C, H, W)``, any floating dtype.
        teacher: same shape and device; no gradient reaches it.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: maps that differ in shape or device.
    """
    student, teacher = as_maps(student, teacher)
    return (student - teacher).square().mean()


class FitNet(StagewiseLoss):
    """:func:`fitnet_loss` for several maps: ``{"loss_fitnet_<stage>"}``.

    Args:
        stages: names of the tapped feature maps.
        weights: factor of each stage's term, or a single one for all.
        regressor: pass the student's maps through a trained regressor first, which :meth:`prepare`
            makes (:func:`pcka.losses.adapters.regressor`); False compares maps of the same shape.
    """

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("last",),
        weights: float | Sequence[float] = (100.0,),
        regressor: bool = True,
    ) -> None:
        super().__init__(stages, weights)
        self.uses_regressor = regressor
        self.same_shape = not regressor
        self.regressors = ModulesByTap()

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the regressor of each stage."""
        teacher = self.need(teacher, "teacher")
        for stage in self.taps if self.uses_regressor else ():
            feature = student.feature(stage)
            shapes = feature.shape, teacher.feature(stage).shape
            self.regressors[stage] = fit(regressor(*shapes), feature)

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        if self.uses_regressor:
            student = adapt(prepared(self.regressors, "FitNet")[stage], student)
        return fitnet_loss(student, teacher)
