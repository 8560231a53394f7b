"""Logit CKA: align the relations between samples and those between classes."""

from __future__ import annotations

from torch import Tensor

from pcka.losses.base import Loss, Outputs, Term
from pcka.losses.checks import as_logits, check_temperature, check_weights
from pcka.losses.numerics import CONSTANT_UP_TO, leave_out_constant
from pcka.ops import cka


def lcka_terms(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | None = None,
    center: bool = True,
    row_normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The two unweighted terms of :func:`lcka_loss`: ``(1 - intra, 1 - inter)``.

    Arguments, results and errors are those of :func:`lcka_loss`.
    """
    student, teacher = (_soften(x, temperature) for x in as_logits(student, teacher))
    if temperature is None:
        masked = student.isneginf() | teacher.isneginf()
        student, teacher = student.masked_fill(masked, 0), teacher.masked_fill(masked, 0)
    grams = {"center": center, "row_normalize": row_normalize}
    intra = _misalignment(student, teacher, level="loss_lcka_intra", **grams)
    inter = _misalignment(student.mT, teacher.mT, level="loss_lcka_inter", **grams)
    return intra, inter


def lcka_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    intra_weight: float = 15.0,
    inter_weight: float = 15.0,
    temperature: float | None = None,
    center: bool = True,
    row_normalize: bool = False,
) -> Tensor:
    r"""Weighted sum of ``1 - CKA`` over samples and ``1 - CKA`` over classes.

    ``w_intra (1 - CKA(Z_s, Z_t)) + w_inter (1 - CKA(Z_s', Z_t'))`` with ``Z (B, P)`` the logits,
    or the class probabilities ``softmax(logits / T)`` (Zhou et al. 2024, section 4.1). When logits
    are compared, minus infinity in either model, which masks a class out, counts as 0 in both.

    Args:
        student: ``(B, P)`` logits, any floating dtype.
        teacher: ``(B, P)`` logits; no gradient reaches it.
        intra_weight: factor of the term over the ``B x B`` Gram matrices of samples.
        inter_weight: factor of the term over the ``P x P`` Gram matrices of classes.
        temperature: ``T > 0`` compares softened probabilities; None compares the logits.
        center: center the Gram matrices.
        row_normalize: divide row ``i`` of each Gram matrix by ``sqrt(K_ii)``.

    Returns:
        A scalar: float32, or float64 for float64 input. A term whose Gram matrices have one row
        (two when centered) is constant, and is 0 with gradient 0.

    Raises:
        ValueError: logits that differ in shape or device, or are not floating, or a
            temperature that is not positive.
    """
    intra, inter = lcka_terms(
        student, teacher, temperature=temperature, center=center, row_normalize=row_normalize
    )
    return intra_weight * intra + inter_weight * inter


def _misalignment(x: Tensor, y: Tensor, *, level: str, center: bool, row_normalize: bool) -> Tensor:
    loss = 1 - cka(x, y, center=center, row_normalize=row_normalize)
    return leave_out_constant(loss, samples=x.shape[0], up_to=CONSTANT_UP_TO[center], level=level)


def _soften(logits: Tensor, temperature: float | None) -> Tensor:
    if temperature is None:
        return logits
    check_temperature(temperature)
    return (logits / temperature).softmax(1)


class LCKA(Loss):
    """:func:`lcka_loss`, with the same arguments: ``{"loss_lcka_intra", "loss_lcka_inter"}``."""

    needs_logits = True
    relational = True

    def __init__(
        self,
        *,
        intra_weight: float = 15.0,
        inter_weight: float = 15.0,
        temperature: float | None = None,
        center: bool = True,
        row_normalize: bool = False,
    ) -> None:
        super().__init__()
        check_weights(intra_weight=intra_weight, inter_weight=inter_weight)
        if temperature is not None:
            check_temperature(temperature)
        self.intra_weight = intra_weight
        self.inter_weight = inter_weight
        self.temperature = temperature
        self.center = center
        self.row_normalize = row_normalize

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """The term over samples and the one over classes."""
        intra, inter = lcka_terms(
            self.need(student.logits, "student.logits"),
            self.need(self.need(teacher, "teacher").logits, "teacher.logits"),
            temperature=self.temperature,
            center=self.center,
            row_normalize=self.row_normalize,
        )
        return {
            f"loss_{self.log_name}_intra": Term(self.intra_weight, intra),
            f"loss_{self.log_name}_inter": Term(self.inter_weight, inter),
        }
