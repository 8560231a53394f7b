"""How alike the layers of two models are, over a whole data set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pcka.modes import evaluation_mode
from pcka.ops.reference import accumulation_dtype, unbiased_hsic, without_autocast
from pcka.taps import FeatureTap

MIN_SAMPLES = 4  # unbiased HSIC is not defined below


class LayerwiseCKA:
    r"""Minibatch CKA of pairs of layers: the ratio of the sums, not the mean of the ratios.

    ``sum_b HSIC_u(K_b, L_b) / sqrt(sum_b HSIC_u(K_b, K_b) * sum_b HSIC_u(L_b, L_b))`` over
    batches ``b``, with ``HSIC_u`` the unbiased estimate (Song et al. 2012, eq. 5) of the Gram
    matrices of a batch (Nguyen, Raghu and Kornblith 2021, eq. 4). The sums are unbiased whatever
    the batch size, so the result does not rise with small batches of wide features, as plain CKA
    does. It may come out slightly negative for unrelated layers.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def update(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Add one batch; a batch of fewer than 4 samples says nothing and is passed over.

        Args:
            student: layer name -> features ``(B, ...)``, flattened to one row per sample.
            teacher: the same names and samples; the widths may differ.

        Raises:
            ValueError: layers that differ by name, or features of different samples.
        """
        if student.keys() != teacher.keys():
            raise ValueError(
                "student and teacher must hold features of the same layers; got student "
                f"{sorted(student)} and teacher {sorted(teacher)}"
            )
        for name, feature in student.items():
            if len(feature) != len(teacher[name]):
                raise ValueError(
                    f"{name}: student and teacher must hold the same samples; got student "
                    f"{tuple(feature.shape)} and teacher {tuple(teacher[name].shape)}"
                )
            if len(feature) >= MIN_SAMPLES:
                k, l = _gram(feature), _gram(teacher[name])
                batch = torch.cat([unbiased_hsic(k, l), unbiased_hsic(k, k), unbiased_hsic(l, l)])
                self._sums[name] = self._sums[name] + batch if name in self._sums else batch

    def compute(self) -> dict[str, float]:
        """Layer name -> CKA of all batches so far; 0 where a layer is constant.

        NaN where a feature was NaN or infinite.

        Raises:
            ValueError: no batch of at least 4 samples came.
        """
        if not self._sums:
            raise ValueError(f"no batch of at least {MIN_SAMPLES} samples was given to update()")
        return {name: _ratio(*sums.tolist()) for name, sums in self._sums.items()}


def layerwise_cka(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    taps: Mapping[str, tuple[str, str]],
) -> dict[str, float]:
    """Minibatch CKA of tapped layers of two models over a data set; see :class:`LayerwiseCKA`.

    Both models run in eval mode without gradients and are left in the mode they were in.

    Args:
        student: images -> anything.
        teacher: images -> anything.
        batches: images ``(B, C, H, W)``, on the models' device.
        taps: layer name -> (module path in the student, module path in the teacher).

    Returns:
        layer name -> CKA.

    Raises:
        ValueError: a path that a model lacks, or no batch of at least 4 samples.
    """
    result = LayerwiseCKA()
    student_paths = {name: paths[0] for name, paths in taps.items()}
    teacher_paths = {name: paths[1] for name, paths in taps.items()}
    with (
        torch.no_grad(),
        evaluation_mode(student, teacher),
        FeatureTap(student, student_paths) as student_tap,
        FeatureTap(teacher, teacher_paths) as teacher_tap,
    ):
        for images in batches:
            student(images)
            teacher(images)
            result.update(student_tap.pop(), teacher_tap.pop())
    return result.compute()


def _gram(feature: Tensor) -> Tensor:
    """``(B, ...)`` -> ``(1, B, B)`` in float64.

    Unbiased HSIC does not depend on the features' mean; without it the Gram loses no digits to
    the large mean that features have after a ReLU.
    """
    rows = feature.detach().flatten(1)
    rows = rows.to(accumulation_dtype(rows.dtype))
    rows = rows - rows.mean(0)
    with without_autocast(rows.device):
        return (rows @ rows.T).double()[None]


def _ratio(kl: float, kk: float, ll: float) -> float:
    if not all(map(math.isfinite, (kl, kk, ll))):
        return math.nan
    return kl / (kk * ll) ** 0.5 if kk > 0 and ll > 0 else 0.0
