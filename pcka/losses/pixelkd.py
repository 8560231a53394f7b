"""Pixel-wise KD: the class scores of every position imitate the teacher's (Liu et al. 2019)."""

from __future__ import annotations

from torch import Tensor

from pcka.losses.base import NO_CONTEXT, Context, Loss, Outputs, Term
from pcka.losses.checks import as_maps, check_temperature, check_weights, unlike
from pcka.losses.heads import PixelHead
from pcka.losses.kd import kd_loss
from pcka.losses.numerics import at_one_size


def pixel_kd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Divergence of the softened class probabilities of each position from the teacher's.

    ``T^2 / (B H W) * sum KL(softmax(t / T) || softmax(s / T))``, the softmax over the classes (Liu
    et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019, equation 1,
    with ``T = 1``): :func:`pcka.losses.kd_loss` with every position as a sample.

    Args:
        student: ``(B, K, H, W)`` logits, any floating dtype.
        teacher: same shape and device; no gradient reaches it.
        temperature: ``T > 0``, divides the logits.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: logits that differ in shape or device, or a temperature that is not positive.
    """
    return kd_loss(*positions(student, teacher), temperature=temperature)


def positions(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of the same shape ``(B, K, H, W)`` -> one row per position, ``(B * H * W, K)`` each."""
    own, other = (x.movedim(1, -1).flatten(0, -2) for x in as_maps(student, teacher))
    return own, other


class PixelLoss(Loss):
    """``compare(student, teacher)`` on both models' class scores: ``{"loss_<log_name>"}``.

    Args:
        weight: factor of the term.
    """

    needs_head = PixelHead

    def __init__(self, weight: float) -> None:
        super().__init__()
        check_weights(weight=weight)
        self.weight = weight

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make nothing, but reject models with different classes before training starts."""
        self.scores(student, teacher)

    def heads(self, student: Outputs, teacher: Outputs | None) -> tuple[PixelHead, PixelHead]:
        """The outputs of both models' heads.

        Raises:
            ValueError: a model without a per-pixel classification head.
        """
        heads = student.head, self.need(teacher, "teacher").head
        for head, role in zip(heads, ("student", "teacher")):
            if not isinstance(head, PixelHead):
                raise ValueError(
                    f"{role}.head: {type(self).__name__} needs the class scores of every pixel, "
                    f"got {type(head).__name__}; use a model that returns them"
                )
        return heads  # type: ignore[return-value]

    def scores(self, student: Outputs, teacher: Outputs | None) -> tuple[Tensor, Tensor]:
        """Both models' logits, ``(B, K, H, W)``, pooled to the smaller size.

        Raises:
            ValueError: scores of different classes, or none.
        """
        own, other = self.heads(student, teacher)
        pair = at_one_size(own.logits, other.logits)
        if pair[0].shape != pair[1].shape:
            wanted = "class scores (B, K, H, W) of the same classes"
            way_out = "Give both models the same number of classes, in the same order"
            raise unlike(own.logits.shape, other.logits.shape, wanted, way_out)
        return pair

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss on logits ``(B, K, H, W)``, a scalar without its weight."""
        raise NotImplementedError

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """The single term."""
        value = self.compare(*self.scores(student, teacher))
        return {f"loss_{self.log_name}": Term(self.weight, value)}


class PixelKD(PixelLoss):
    """:func:`pixel_kd_loss` on the class scores of every pixel: ``{"loss_pixelkd"}``.

    Args:
        weight: factor of the term.
        temperature: ``T > 0``, divides the logits.
    """

    def __init__(self, *, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(weight)
        check_temperature(temperature)
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pixel_kd_loss(student, teacher, temperature=self.temperature)
