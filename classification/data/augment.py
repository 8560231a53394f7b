"""Random crop and flip of a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_and_flip(images: Tensor, offsets: Tensor, flipped: Tensor, padding: int) -> Tensor:
    """Pad every image with zeros, cut a window of its own size out of it, mirror it if wanted.

    ``out[b, c, y, x] = padded[b, c, offsets[b, 0] + y, offsets[b, 1] + x']`` with ``x' = x``, or
    ``S - 1 - x`` where ``flipped[b]``.

    Args:
        images: (B, C, S, S), any dtype.
        offsets: upper left corner (row, column) of each window in the padded image, (B, 2) int64,
            within 0..2 * padding.
        flipped: which windows are mirrored left to right, (B,) bool.
        padding: pixels added on each side.

    Returns:
        (B, C, S, S), the images' dtype.
    """
    batch, channels, _, side = images.shape
    padded = F.pad(images, [padding] * 4)
    line = torch.arange(side, device=images.device)
    rows = offsets[:, :1] + line
    columns = offsets[:, 1:] + torch.where(flipped[:, None], line.flip(0), line)
    image = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
