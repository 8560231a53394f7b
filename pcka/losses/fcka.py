"""Feature CKA: relate the samples of a batch as the teacher's features do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcka.losses.base import StagewiseLoss
from pcka.losses.checks import as_samples
from pcka.losses.numerics import CONSTANT_UP_TO, at_one_size, leave_out_constant
from pcka.ops import cka
from pcka.ops.functional import LEAST_UNBIASED, check_choice

SAMPLES = ("images", "positions")


def fcka_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    center: bool = True,
    unbiased: bool = False,
    samples: str = "images",
    level: str = "fcka_loss",
) -> Tensor:
    r"""``1 - CKA`` of the features of a batch.

    ``1 - CKA(X_s, X_t)`` with ``X = features (B, C*H*W)``, one row per image (Zhou et al. 2024,
    section 4.1), or ``(B*H*W, C)``, one row per position of the map. The widths of the two models
    may differ: only the Gram matrices between the rows are compared.

    Args:
        student: ``(B, C_s, H_s, W_s)`` or ``(B, D_s)``, any floating dtype.
        teacher: ``(B, C_t, H_t, W_t)`` or ``(B, D_t)``; no gradient reaches it.
        center: center the Gram matrices.
        unbiased: use the unbiased estimator of HSIC (:func:`pcka.cka`): for few images and wide
            maps, where the plain estimate is close to 1 for any features.
        samples: ``"images"`` or ``"positions"``; for positions both maps are pooled to the smaller
            size.
        level: name of this level in the warning about a degenerate batch.

    Returns:
        A scalar: float32, or float64 for float64 input. In [0, 1] unless ``unbiased``. If the
        batch makes CKA constant (one sample, or two when centered), it is 0 with gradient 0.

    Raises:
        ValueError: features that differ in batch size or device; positions of features that are
            not maps; ``unbiased`` without centering, with positions, or with fewer than four
            images.
    """
    _check_settings(center=center, unbiased=unbiased, samples=samples)
    student, teacher = as_samples(student, teacher, widen=False)
    if samples == "positions":
        student, teacher = map(_positions, at_one_size(student, teacher))
    loss = 1 - cka(student.flatten(1), teacher.flatten(1), center=center, unbiased=unbiased)
    up_to = CONSTANT_UP_TO[center]
    return leave_out_constant(loss, samples=student.shape[0], up_to=up_to, level=level)


def _positions(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` -> ``(B*H*W, C)``."""
    return x.movedim(1, -1).flatten(0, 2)


def _check_settings(*, center: bool, unbiased: bool, samples: str) -> None:
    check_choice("samples", samples, SAMPLES)
    if unbiased and not center:
        raise ValueError("unbiased=True estimates the centered HSIC; it needs center=True")
    if unbiased and samples == "positions":
        raise ValueError(
            "unbiased=True needs samples='images': over the many positions of a batch, the plain "
            "estimate has negligible bias and takes far less memory"
        )


class FCKA(StagewiseLoss):
    """:func:`fcka_loss` for several stages: ``{"loss_fcka_<stage>"}``.

    Args:
        stages: names of the tapped features.
        weights: factor of each stage's term, or a single one for all.
        center: center the Gram matrices.
        unbiased: use the unbiased estimator of HSIC.
        samples: ``"images"`` or ``"positions"``.
    """

    relational = True

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("last",),
        weights: float | Sequence[float] = (10.0,),
        center: bool = True,
        unbiased: bool = False,
        samples: str = "images",
    ) -> None:
        super().__init__(stages, weights)
        _check_settings(center=center, unbiased=unbiased, samples=samples)
        self.center = center
        self.unbiased = unbiased
        self.least_samples = LEAST_UNBIASED if unbiased else 1
        self.samples = samples

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        return fcka_loss(
            student,
            teacher,
            center=self.center,
            unbiased=self.unbiased,
            samples=self.samples,
            level=f"loss_{self.log_name}_{stage}",
        )
