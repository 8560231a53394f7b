"""LD: imitate how sure the teacher is of each edge of a box (Zheng et al., CVPR 2022)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import Outputs, Term
from pcka.losses.checks import check_temperature, check_weights, ready, unlike
from pcka.losses.densekd import DenseKD, objects_seen, weights_of
from pcka.losses.heads import Dense


def ld_loss(
    student: Tensor, teacher: Tensor, scores: Tensor, *, temperature: float = 10.0
) -> Tensor:
    r"""Divergence of each edge's distribution from the teacher's, where the teacher sees objects.

    ``T^2 / (4 S) sum_r w_r sum_e KL(softmax(t_re / T) || softmax(s_re / T))``, the softmax over the
    ``N`` distances of an edge (Zheng et al. 2022, equation 3); ``w`` and ``S`` as in
    :func:`pcka.losses.dense_boxes_loss`, instead of the paper's label-based regions. With ``T = 1``
    it is what CrossKD compares for GFL (Wang et al., CVPR 2024, in the authors' public code).
    LD's own code takes the mean over the ``N`` distances, sums over the positive anchors, and does
    not divide by ``S``: a weight ``a`` there is ``a S / N`` here, so 0.25 becomes 0.18 for a dozen
    objects and the usual ``N`` of 17.

    Args:
        student: ``(B, R, 4, N)`` logits, any floating dtype.
        teacher: same shape and device; no gradient reaches it.
        scores: ``(B, R, K)``, the teacher's class logits.
        temperature: ``T > 0``, divides logits.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: distributions of different shapes, or a temperature that is not positive.
    """
    if student.dim() != 4 or student.shape != teacher.shape:
        wanted = "distributions of one shape (B, R, 4, N)"
        way_out = "Both heads need the same levels and distances"
        raise unlike(student.shape, teacher.shape, wanted, way_out)
    check_temperature(temperature)
    student, teacher = ready(student, teacher)
    weights = weights_of(scores.detach().to(student.dtype))
    log_student, log_teacher = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    total = (weights * divergence.sum((-1, -2))).sum()
    return temperature**2 / 4 * total / objects_seen(weights)


class LD(DenseKD):
    """:func:`ld_loss` for dense heads that predict distributions: ``{"loss_ld"}``.

    Args:
        weight: factor of the term.
        temperature: ``T > 0``, divides logits.
    """

    def __init__(self, *, weight: float = 0.25, temperature: float = 10.0) -> None:
        super().__init__()
        check_weights(weight=weight)
        check_temperature(temperature)
        self.weight = weight
        self.temperature = temperature

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """The one term.

        Raises:
            ValueError: a head that predicts one number per edge.
        """
        own, other = self.predictions(*self.heads(student, teacher))
        loss = ld_loss(
            _distributions(own, "student"),
            _distributions(other, "teacher"),
            other.logits,
            temperature=self.temperature,
        )
        return {f"loss_{self.log_name}": Term(self.weight, loss)}


def _distributions(dense: Dense, role: str) -> Tensor:
    if dense.distributions is None:
        raise ValueError(
            f"LD compares distributions over an edge's distances, but the {role}'s head predicts "
            "one number for each edge, as in RetinaNet and FCOS; use DENSEKD or CROSSKD, "
            "which compare the boxes themselves"
        )
    return dense.distributions
