"""The pixel statistics that a model was trained with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn


class PixelNormalize(nn.Module):
    """``(x - mean) / std`` per channel, for one model; teacher and student each have their own.

    Args:
        mean: means of red, green and blue, for pixels in [0, 1].
        std: standard deviations, above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            column = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, column, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised images, (B, 3, H, W) -> (B, 3, H, W), float32."""
        return (images - self.mean) / self.std


def pixel_statistics(role: CfgNode) -> PixelNormalize:
    """Return the normalisation of the section STUDENT or TEACHER."""
    return PixelNormalize(role.PIXEL_MEAN, role.PIXEL_STD)
