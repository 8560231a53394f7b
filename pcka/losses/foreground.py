"""Which positions of a map lie in objects, and how large the objects are."""

from __future__ import annotations

import torch
from torch import Tensor


def foreground_scale(boxes: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
    r"""``1 / (H_r W_r)`` at the positions of each object ``r``, and 0 outside all of them.

    ``H_r`` and ``W_r`` count the rows and columns that the box touches. Where boxes overlap, the
    smallest one counts (Yang et al., "FGD", CVPR 2022, equations 2 and 3).

    Args:
        boxes: ``(M, 5)``, float32 or float64: the image's index, then x0, y0, x1, y1 as fractions
            of the width and height that the maps cover. ``M`` may be 0.
        batch: ``B``, the number of images.
        size: ``H, W`` of the map.

    Returns:
        ``(B, H, W)``, in the dtype of the boxes.

    Raises:
        ValueError: boxes of any other shape.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 5:
        raise ValueError(
            "target must hold the objects' boxes, (M, 5): image, x0, y0, x1, y1; got "
            f"{tuple(boxes.shape)}"
        )
    image, x0, y0, x1, y1 = boxes.unbind(1)
    rows, columns = _touched(y0, y1, size[0]), _touched(x0, x1, size[1])
    area = (rows.sum(1) * columns.sum(1)).to(boxes.dtype)
    inside = (rows[:, :, None] & columns[:, None, :]).flatten(1)
    scale = boxes.new_zeros(batch, inside.shape[1])
    owner = image.long()[:, None].expand_as(inside)
    scale.scatter_reduce_(0, owner, inside / area[:, None], "amax")
    return scale.view(batch, *size)


def _touched(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Which of the equal parts of [0, 1] each interval touches, ``(M, cells)``; at least one."""
    first = (start * cells).floor().clamp(0, cells - 1)
    last = torch.maximum((end * cells).ceil() - 1, first)
    places = torch.arange(cells, device=start.device)
    return (places >= first[:, None]) & (places <= last[:, None])
