"""MGD: generate the teacher's features from the student's masked ones (Yang et al., ECCV 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pcka.losses.adapters import ModulesByTap, adapt, fit_maps, pointwise, prepared
from pcka.losses.base import NO_CONTEXT, Context, Outputs, StagewiseLoss
from pcka.losses.checks import as_maps
from pcka.losses.numerics import at_one_size

MASKS = ("channels", "positions")


def mgd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared differences between generated and teacher features, ``sum((X_s - X_t)^2) / B``.

    The generation loss of Yang et al. 2022, section 3, with the mean over samples of the authors'
    public code. The larger map is pooled (adaptive average) to the size of the smaller one; the
    original takes only maps of the same size.

    Args:
        student: ``(B, C, H_s, W_s)``, generated from the student's features, any floating dtype.
        teacher: ``(B, C, H_t, W_t)``, same device; no gradient reaches it.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: features that are not maps, or differ in batch size or channels.
    """
    student, teacher = as_maps(*at_one_size(student, teacher))
    return (student - teacher).square().sum() / len(student)


def random_mask(x: Tensor, ratio: float, over: str) -> Tensor:
    """Mask of channels or positions of ``x (B, C, H, W)``, False with probability ``ratio``.

    Drawn per sample by torch's generator for the device of ``x``: bool, ``(B, C, 1, 1)`` for
    ``over="channels"``, ``(B, 1, H, W)`` for ``"positions"``.
    """
    b, c, h, w = x.shape
    shape = (b, c, 1, 1) if over == "channels" else (b, 1, h, w)
    return torch.rand(shape, device=x.device) >= ratio


class _Generation(nn.Module):
    """Align the width if it differs, mask, and generate: ``(B, C_s, H, W)`` -> ``C_t``."""

    def __init__(self, c_s: int, c_t: int, mask_ratio: float, mask: str) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.mask = mask
        self.align = nn.Identity() if c_s == c_t else pointwise(c_s, c_t)
        self.generate = nn.Sequential(
            nn.Conv2d(c_t, c_t, 3, padding=1), nn.ReLU(), nn.Conv2d(c_t, c_t, 3, padding=1)
        )

    def forward(self, features: Tensor) -> Tensor:
        aligned = self.align(features)
        return self.generate(aligned * random_mask(aligned, self.mask_ratio, self.mask))


class MGD(StagewiseLoss):
    """:func:`mgd_loss` for several stages: ``{"loss_mgd_<stage>"}``.

    ``X_s = G(M * A(student))``: ``A`` a 1x1 convolution if the widths differ, ``M`` a random
    mask, ``G`` a 3x3 convolution, ReLU and another 3x3 convolution (Yang et al. 2022, section 3).
    The defaults are those of the authors' public code for classification, which masks whole
    channels; for detection it uses ``mask="positions"``, ``mask_ratio=0.65`` and weights of 2e-5.

    Args:
        stages: names of the tapped feature maps.
        weights: factor of each stage's term, or a single one for all.
        mask_ratio: fraction of the channels or positions to mask, in [0, 1).
        mask: ``"channels"`` or ``"positions"``.
    """

    def __init__(
        self,
        *,
        stages: Sequence[str] = ("last",),
        weights: float | Sequence[float] = (7e-5,),
        mask_ratio: float = 0.15,
        mask: str = "channels",
    ) -> None:
        super().__init__(stages, weights)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}")
        if mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}; got {mask!r}")
        self.mask_ratio = mask_ratio
        self.mask = mask
        self.adapters = ModulesByTap()

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the generating convolutions of each stage."""
        teacher = self.need(teacher, "teacher")
        make = partial(_Generation, mask_ratio=self.mask_ratio, mask=self.mask)
        self.adapters = fit_maps(make, student, teacher, self.taps)

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        return mgd_loss(adapt(prepared(self.adapters, "MGD")[stage], student), teacher)
