"""Logit CKA for the class scores of pixels: relations between positions, and between classes."""

from __future__ import annotations

from torch import Tensor

from pcka.losses.base import Outputs, Term
from pcka.losses.checks import as_maps, check_weights
from pcka.losses.lcka import lcka_terms
from pcka.losses.pixelkd import PixelLoss, positions

SAMPLES = ("positions", "images")


def pixel_cka_terms(
    student: Tensor, teacher: Tensor, *, samples: str = "positions", center: bool = True
) -> tuple[Tensor, Tensor]:
    """The two unweighted terms of :func:`pixel_cka_loss`: ``(1 - intra, 1 - inter)``.

    Arguments, results and errors are those of :func:`pixel_cka_loss`.
    """
    if samples not in SAMPLES:
        raise ValueError(f"samples must be one of {', '.join(SAMPLES)}; got {samples!r}")
    if samples == "images":
        own, other = (x.flatten(1) for x in as_maps(student, teacher))
    else:
        own, other = positions(student, teacher)
    return lcka_terms(own, other, center=center)


def pixel_cka_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    intra_weight: float = 10.0,
    inter_weight: float = 10.0,
    samples: str = "positions",
    center: bool = True,
) -> Tensor:
    r"""``w_intra (1 - CKA(Z_s, Z_t)) + w_inter (1 - CKA(Z_s', Z_t'))`` of class scores.

    With ``samples="positions"``, our own definition, every position is a sample: ``Z (B H W, K)``
    are the logits, the first term aligns the relations between positions and the second those
    between classes, as :func:`pcka.losses.lcka_loss` does for single-label images. With
    ``samples="images"``, every image is a sample, ``Z (B, K H W)``: what the public code of Zhou et
    al. 2024 compares for Cityscapes (there uncentered, with weights of 10, and with each row of a
    Gram matrix divided by the root of its diagonal entry, which is left out here).

    Args:
        student: ``(B, K, H, W)`` logits, any floating dtype.
        teacher: same shape and device; no gradient reaches it.
        intra_weight: factor of the term over samples.
        inter_weight: factor of the term over classes, or over the entries of an image.
        samples: ``"positions"`` or ``"images"``.
        center: center the Gram matrices, which makes CKA of one or two images constant.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: logits that differ in shape or device, or an unknown ``samples``.
    """
    intra, inter = pixel_cka_terms(student, teacher, samples=samples, center=center)
    return intra_weight * intra + inter_weight * inter


class PixelCKA(PixelLoss):
    """:func:`pixel_cka_loss`: ``{"loss_pixelcka_intra", "loss_pixelcka_inter"}``.

    Args:
        intra_weight, inter_weight, samples, center: of :func:`pixel_cka_loss`.
    """

    def __init__(
        self,
        *,
        intra_weight: float = 10.0,
        inter_weight: float = 10.0,
        samples: str = "positions",
        center: bool = True,
    ) -> None:
        super().__init__(1.0)
        check_weights(intra_weight=intra_weight, inter_weight=inter_weight)
        if samples not in SAMPLES:
            raise ValueError(f"samples must be one of {', '.join(SAMPLES)}; got {samples!r}")
        self.intra_weight, self.inter_weight = intra_weight, inter_weight
        self.samples, self.center = samples, center

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """The term over samples and the one over classes."""
        pair = self.scores(student, teacher)
        intra, inter = pixel_cka_terms(*pair, samples=self.samples, center=self.center)
        return {
            f"loss_{self.log_name}_intra": Term(self.intra_weight, intra),
            f"loss_{self.log_name}_inter": Term(self.inter_weight, inter),
        }
