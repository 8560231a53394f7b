"""KDSVD: keep the relations of neighbouring stages' main directions (Lee et al., ECCV 2018)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pcka.losses.adapters import ModulesByTap, adapt, fit, pointwise
from pcka.losses.base import NO_CONTEXT, Context, Loss, Outputs, Term
from pcka.losses.checks import as_maps_of_one_width, as_stages, check_counts, check_weights
from pcka.ops.reference import without_autocast

CANDIDATES = 3  # student directions to match with, beyond as many as the teacher has
BANDWIDTH = 8.0
DAMPING = 1e-3  # gaps between eigenvalues below this share of their sum count as ties


def kdsvd_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], *, k: int = 1) -> Tensor:
    r"""Squared difference of the correlations between the singular vectors of neighbouring stages.

    ``1/B sum over stages i > 1 of ||R_s - R_t||^2``, ``R[c, c', j] = exp(-(V_i[c, j] - V_i-1[c',
    j])^2 / 8)``, ``V (C, k)`` the first right singular vectors of a sample's map ``(H * W, C)``,
    times the teacher's singular values scaled to unit length. Each of the teacher's vectors is
    compared with the closest of the student's first ``k + 3``, whose sign is matched to it (Lee et
    al. 2018, section 3; in the form of Tian et al. 2020). The sign of a singular vector is
    arbitrary: the teacher's are chosen to have a non-negative sum, so the loss does not depend on
    how they are computed.

    The gradient is that of the singular vectors, damped where their singular values nearly
    coincide and it would be unbounded.

    Args:
        students: one ``(B, C, H_s, W_s)`` per stage in order, at least two, any floating dtype.
        teachers: ``(B, C, H_t, W_t)`` of the same stages, widths, samples and device; no gradient
            reaches them.
        k: number of vectors per stage. Those that a map lacks, because it has fewer channels or
            positions, are zeros, like vectors of the singular value 0.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: fewer than two stages, or features that are not maps or differ in width or
            batch size.
    """
    if len(students) < 2 or len(students) != len(teachers):
        got = f"{len(students)} and {len(teachers)}"
        raise ValueError(f"both must hold maps of the same two or more stages; got {got}")
    pairs = [as_maps_of_one_width(*pair) for pair in zip(students, teachers)]
    with without_autocast(students[0].device):
        vectors = [_matched_vectors(s, t, k) for s, t in pairs]
        differences = [
            (_correlations(s, s_before) - _correlations(t, t_before)).square().sum()
            for (s_before, t_before), (s, t) in itertools.pairwise(vectors)
        ]
        return torch.stack(differences).sum() / len(students[0])


def _matched_vectors(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scaled vectors ``(B, C, k)`` of both models; the student's are matched to the teacher's."""
    values, v_t = _singular_vectors(teacher, k)
    v_t = torch.where(v_t.sum(1, keepdim=True) < 0, -v_t, v_t)
    _, v_s = _singular_vectors(student, k + CANDIDATES)
    cosines = v_s.detach().mT @ v_t
    closest = cosines.abs().argmax(1, keepdim=True)
    side = cosines.gather(1, closest).sign()
    v_s = v_s.gather(2, closest.expand(-1, v_s.shape[1], -1)) * side
    scale = F.normalize(values, dim=1)[:, None]
    return v_s * scale, v_t * scale


def _correlations(v: Tensor, before: Tensor) -> Tensor:
    """``(B, C, C', k)``; a stage with fewer vectors than the other has zeros in their place."""
    count = max(v.shape[2], before.shape[2])
    v, before = (F.pad(vectors, (0, count - vectors.shape[2])) for vectors in (v, before))
    return (-(v[:, :, None] - before[:, None]).square() / BANDWIDTH).exp()


def _singular_vectors(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first singular values ``(B, count)`` and right vectors ``(B, C, count)`` of each map.

    Computed from the smaller of the two Gram matrices. The map is scaled to norm 1 first, which
    changes no vector; an all-zero map stays zero and gets no gradient.
    """
    rows = x.flatten(2).mT
    norm = torch.linalg.matrix_norm(rows.detach(), keepdim=True)
    rows = rows * norm.reciprocal().masked_fill(norm == 0, 0)
    tall = rows.shape[1] >= rows.shape[2]
    values, vectors = _eigenvectors(rows.mT @ rows if tall else rows @ rows.mT, count)
    if not tall:
        vectors = F.normalize(rows.mT @ vectors, dim=1, eps=DAMPING)
    return values.clamp(min=0).sqrt(), vectors


def _eigenvectors(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first eigenvalues and vectors of symmetric ``(B, n, n)``; the vectors have a gradient.

    ``dv_j = sum_i v_i (v_i^T dG v_j) / (l_j - l_i)``, with ``1 / gap`` replaced by
    ``gap / (gap^2 + damping^2)``, which is bounded and 0 at ``i = j``.
    """
    with torch.no_grad():
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(gram))
        first = vectors[..., :count]
        gaps = values[:, None, :count] - values[..., None]
        inverse = gaps / (gaps.square() + DAMPING**2)
    change = gram - gram.detach()  # 0, with the gradient of the Gram matrix
    return values[:, :count], first + vectors @ (inverse * (vectors.mT @ change @ first))


class KDSVD(Loss):
    """:func:`kdsvd_loss` for several stages: ``{"loss_kdsvd"}``.

    If the widths of a stage differ, the student's map passes through a 1x1 convolution that
    :meth:`prepare` makes and that is trained with the student.

    Args:
        stages: names of the tapped feature maps, in the models' order.
        weight: factor of the term.
        k: number of vectors per stage, as for :func:`kdsvd_loss`.
    """

    capturable = False  # eigh waits for its result

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("stage1", "stage2", "stage3"),
        weight: float = 1.0,
        k: int = 1,
    ) -> None:
        super().__init__()
        self.taps = as_stages(stages)
        if len(self.taps) < 2:
            raise ValueError(
                f"stages must name two or more, whose relations are compared; got {list(stages)}"
            )
        check_weights(weight=weight)
        check_counts(k=k)
        self.weight = weight
        self.k = k
        self.adapters = ModulesByTap()

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make a 1x1 convolution for each stage whose widths differ."""
        teacher = self.need(teacher, "teacher")
        for stage in self.taps:
            feature = student.feature(stage)
            widths = feature.shape[1], teacher.feature(stage).shape[1]
            if widths[0] != widths[1]:
                self.adapters[stage] = fit(pointwise(*widths, bias=False), feature)

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """One term for all stages."""
        teacher = self.need(teacher, "teacher")
        students = [self._adapted(student.feature(stage), stage) for stage in self.taps]
        teachers = [teacher.feature(stage) for stage in self.taps]
        loss = kdsvd_loss(students, teachers, k=self.k)
        return {f"loss_{self.log_name}": Term(self.weight, loss)}

    def _adapted(self, feature: Tensor, stage: str) -> Tensor:
        return adapt(self.adapters[stage], feature) if stage in self.adapters else feature
