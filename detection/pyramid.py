"""P6 and P7 as detectron2's configuration cannot describe them.

This file stands alone: an export takes it along, for detectors whose pyramid needs it.
"""

from __future__ import annotations

from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import Tensor
from torch.nn import functional as F


class P6P7(LastLevelP6P7):
    """P6 and P7 by strided convolutions, with or without the ReLU between them.

    Args:
        in_channels: of the map that P6 is made from.
        out_channels: of P6 and P7.
        in_feature: that map, ``"res5"`` or ``"p5"``.
        relu: apply a ReLU to P6 before P7 is made from it, as detectron2 always does.
    """

    def __init__(self, in_channels: int, out_channels: int, in_feature: str, *, relu: bool) -> None:
        super().__init__(in_channels, out_channels, in_feature)
        self.relu = relu

    def forward(self, x: Tensor) -> list[Tensor]:
        """P6 and P7, ``(B, C, ceil(H / 2), ceil(W / 2))`` and half of that."""
        p6 = self.p6(x)
        return [p6, self.p7(F.relu(p6) if self.relu else p6)]
