"""ATSS: assignment of objects to the points of a dense detector (Zhang et al., CVPR 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, pairwise_iou, pairwise_point_box_distance
from torch import Tensor

LEAST = 0.01  # minimum distance of a point from the edges of its box, in pixels


@torch.no_grad()
def atss_match(
    anchors: Sequence[Boxes], objects: Boxes, *, scale: float = 8.0, topk: int = 9
) -> Tensor:
    """Return the index of each point's object, ``(R,)``, or -1 for background.

    An object's candidates are, on each level, the ``topk`` points whose centres are nearest to its
    own. A candidate is assigned to the object if its centre lies inside the object and the IoU of
    its square with the object is at least the candidates' mean IoU plus one standard deviation. A
    point assigned to several objects goes to the one that it overlaps most (Zhang et al. 2020,
    algorithm 1).

    Args:
        anchors: squares around the points of each level, one stride wide.
        objects: ``M`` boxes; ``M`` may be 0.
        scale: side of the squares that are compared with objects, in strides.
        topk: candidates per object and level.
    """
    points = Boxes.cat(list(anchors))
    if not len(objects):
        return torch.full((len(points),), -1, device=points.device)
    centers = points.get_centers()
    sides = scale * (points.tensor[:, 2:] - points.tensor[:, :2]) / 2
    squares = Boxes(torch.cat([centers - sides, centers + sides], 1))
    overlaps = pairwise_iou(objects, squares)
    apart = (objects.get_centers()[:, None] - centers).norm(dim=2)
    nearest, first = [], 0
    for level in apart.split([len(level) for level in anchors], 1):
        nearest.append(level.topk(min(topk, level.shape[1]), largest=False).indices + first)
        first += level.shape[1]
    candidates = torch.cat(nearest, 1)
    found = overlaps.gather(1, candidates)
    deviation = found.std(1, correction=min(1, found.shape[1] - 1), keepdim=True)
    least = found.mean(1, keepdim=True) + deviation
    inside = pairwise_point_box_distance(centers, objects).amin(2).T > LEAST
    own = torch.zeros_like(inside).scatter(1, candidates, found >= least) & inside
    best, index = overlaps.masked_fill(~own, -1).max(0)
    return index.masked_fill(best < 0, -1)
