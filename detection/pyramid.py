"""Variants of P6 and P7 that detectron2's configuration cannot describe.

This file is self-contained: exports of detectors whose pyramid needs it include a copy.
"""

from __future__ import annotations

from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import Tensor
from torch.nn import functional as F


class P6P7(LastLevelP6P7):
    """P6 and P7 from strided convolutions, with or without the ReLU between them.

    Args:
        in_channels: channels of the map that P6 is made from.
        out_channels: channels of P6 and P7.
        in_feature: the map that P6 is made from, ``"res5"`` or ``"p5"``.
        relu: apply a ReLU to P6 before P7 is made from it, as detectron2 always does.
    """

    def __init__(self, in_channels: int, out_channels: int, in_feature: str, *, relu: bool) -> None:
        super().__init__(in_channels, out_channels, in_feature)
        self.relu = relu

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return P6 and P7, ``(B, C, ceil(H / 2), ceil(W / 2))`` and half of that size."""
        p6 = self.p6(x)
        return [p6, self.p7(F.relu(p6) if self.relu else p6)]
