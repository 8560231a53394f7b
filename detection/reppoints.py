"""RepPoints from YAML, and its training (Yang et al., "RepPoints", ICCV 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss, smooth_l1_loss
from omegaconf import DictConfig
from torch import Tensor, nn

from detection.lazy import lazy_backbone, lazy_detector, lazy_head
from detection.reppoints_model import RepPointsDetector, RepPointsHead
from pcka.engine.config import ConfigError

BASE = 4.0  # side of an object on its level, in strides; also the unit of the box losses
BETA = 0.11  # where the smooth L1 loss becomes linear
IGNORED, BACKGROUND = -2, -1
OBJECT_FROM, BACKGROUND_TO = 0.5, 0.4  # IoU thresholds


@META_ARCH_REGISTRY.register()
def RepPoints(cfg: CfgNode) -> nn.Module:
    """Build RepPoints from ``MODEL.REPPOINTS``."""
    keys, lazy = cfg.MODEL.REPPOINTS, lazy_reppoints(cfg)
    lazy.update(
        _target_=TrainedRepPoints,
        first_weight=keys.FIRST_WEIGHT,
        box_weight=keys.BOX_WEIGHT,
        focal_loss_alpha=keys.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=keys.FOCAL_LOSS_GAMMA,
    )
    return instantiate(lazy)


class TrainedRepPoints(RepPointsDetector):
    """:class:`RepPointsDetector` with its losses.

    ``loss_reppoints_first`` is the smooth L1 distance of the first points' box from its object, at
    the place nearest to the object on its level. ``loss_reppoints_loc`` is that of the refined
    points, at the places whose first box :func:`overlapping_places` assigns to an object, and
    ``loss_reppoints_cls`` is the focal loss under the same assignment. Each is divided by its
    number of places with an object in this process, counting at least one per image.

    Args:
        first_weight, box_weight: weights of the two distances.
        keywords: passed to :class:`RepPointsDetector`.
    """

    def __init__(self, *, first_weight: float, box_weight: float, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.first_weight, self.box_weight = first_weight, box_weight

    def forward_training(  # type: ignore[override]
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: Sequence[Sequence[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Loss terms of a batch, in float32 even under autocast."""
        numbers = self.numbers
        rows = self._transpose_dense_predictions(predictions, [self.num_classes, numbers, numbers])
        logits, points, first = (torch.cat(levels, 1).float() for levels in rows)
        anchors = self.anchor_generator(features)
        places = Boxes.cat(anchors).tensor
        first_boxes, boxes = (
            torch.stack([self.box2box_transform.apply_deltas(image, places) for image in corners])
            for corners in (self.corners(first), self.corners(points))
        )
        nearest = [nearest_places(anchors, image.gt_boxes) for image in gt_instances]
        seen = [
            overlapping_places(own, image.gt_boxes)
            for own, image in zip(first_boxes.detach(), gt_instances)
        ]
        sides = BASE * (places[:, 2] - places[:, 0])
        count = _count(seen)
        get_event_storage().put_scalar("num_pos_anchors", count / len(logits))
        return {
            "loss_reppoints_cls": self._classes(logits, seen, gt_instances) / count,
            "loss_reppoints_first": self.first_weight
            * _distance(first_boxes, nearest, gt_instances, sides)
            / _count(nearest),
            "loss_reppoints_loc": self.box_weight
            * _distance(boxes, seen, gt_instances, sides)
            / count,
        }

    def _classes(
        self, logits: Tensor, owners: Sequence[Tensor], gt_instances: Sequence[Instances]
    ) -> Tensor:
        wanted = torch.zeros_like(logits)
        for image, (own, instances) in enumerate(zip(owners, gt_instances)):
            (place,) = (own >= 0).nonzero(as_tuple=True)
            wanted[image, place, instances.gt_classes[own[place]]] = 1
        counted = torch.stack(list(owners)) != IGNORED
        return sigmoid_focal_loss(
            logits[counted],
            wanted[counted],
            alpha=self.focal_loss_alpha,
            gamma=self.focal_loss_gamma,
            reduction="sum",
        )


def _count(owners: Sequence[Tensor]) -> int:
    """Count the places that have an object, at least one per image."""
    return sum(max(1, int((own >= 0).sum())) for own in owners)


def _distance(
    boxes: Tensor, owners: Sequence[Tensor], gt_instances: Sequence[Instances], sides: Tensor
) -> Tensor:
    """Sum of the smooth L1 distances of boxes ``(B, R, 4)`` from the objects of their places."""
    total = boxes.new_zeros(())
    for own_boxes, own, instances in zip(boxes, owners, gt_instances):
        chosen = own >= 0
        wanted, unit = instances.gt_boxes.tensor[own[chosen]], sides[chosen, None]
        apart = smooth_l1_loss(own_boxes[chosen] / unit, wanted / unit, BETA, reduction="sum")
        total = total + apart
    return total


@torch.no_grad()
def nearest_places(anchors: Sequence[Boxes], objects: Boxes) -> Tensor:
    """The object of each place, ``(R,)``, or -1: each object takes the nearest place of its level.

    The level of an object of ``w x h`` pixels is the one whose stride is the largest power of two
    up to ``sqrt(w h) / 4``, within the strides of the levels. Distances are measured in units of
    ``w`` and ``h``. A place that is nearest to several objects goes to the closest one.

    Args:
        anchors: squares around the places of each level, one stride wide.
        objects: ``M`` boxes; ``M`` may be 0.
    """
    counts = [len(level) for level in anchors]
    places = Boxes.cat(list(anchors))
    owner = torch.full((len(places),), BACKGROUND, device=places.device)
    if not len(objects):
        return owner
    sides = torch.stack([level.tensor[0, 2] - level.tensor[0, 0] for level in anchors])
    strides = sides.log2().round()
    extent = (objects.tensor[:, 2:] - objects.tensor[:, :2]).clamp_min(1e-6)
    wanted = (extent / BASE).log2().mean(1).trunc()
    level = wanted.clamp(strides.amin(), strides.amax())
    of_place = strides.repeat_interleave(torch.tensor(counts, device=strides.device))
    apart = (places.get_centers() - objects.get_centers()[:, None]) / extent[:, None]
    distance = apart.norm(dim=2).masked_fill(of_place != level[:, None], float("inf"))
    least, place = distance.min(1)
    own = torch.full_like(distance, float("inf")).scatter(1, place[:, None], least[:, None])
    best, index = own.min(0)
    return torch.where(best.isfinite(), index, owner)


@torch.no_grad()
def overlapping_places(boxes: Tensor, objects: Boxes) -> Tensor:
    """The object of each place by the box predicted there, ``(R,)``; -1 background, -2 ignored.

    A box belongs to the object that it overlaps most if their IoU is at least 0.5; below 0.4 it is
    background. The best box of every object belongs to it, however small their overlap.

    Args:
        boxes: ``(R, 4)``, one box per place.
        objects: ``M`` boxes; ``M`` may be 0.
    """
    if not len(objects):
        return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
    overlaps = pairwise_iou(objects, Boxes(boxes))
    best, index = overlaps.max(0)
    owner = torch.where(best >= OBJECT_FROM, index, IGNORED)
    owner[best < BACKGROUND_TO] = BACKGROUND
    top = overlaps.amax(1, keepdim=True)
    forced = overlaps.masked_fill((overlaps < top) | (top <= 0), -1)
    value, chosen = forced.max(0)
    return torch.where(value > 0, chosen, owner)


def lazy_reppoints(cfg: CfgNode) -> DictConfig:
    """Return the LazyConfig of the detector that the YAML keys describe, for inference.

    Raises:
        ConfigError: values that are invalid for RepPoints, or a backbone that a LazyConfig cannot
            describe.
    """
    keys = cfg.MODEL.REPPOINTS
    if keys.NUM_CONVS < 1:
        raise ConfigError(f"MODEL.REPPOINTS.NUM_CONVS: expected 1 or more, got {keys.NUM_CONVS}")
    side = round(keys.NUM_POINTS**0.5)
    if side % 2 == 0 or side**2 != keys.NUM_POINTS:
        raise ConfigError(
            "MODEL.REPPOINTS.NUM_POINTS: expected the square of an odd number, e.g. 9, got "
            f"{keys.NUM_POINTS}"
        )
    if keys.TRANSFORM not in ("moment", "minmax"):
        raise ConfigError(
            f"MODEL.REPPOINTS.TRANSFORM: expected 'moment' or 'minmax', got {keys.TRANSFORM!r}"
        )
    head = lazy_head(RepPointsHead, cfg, keys)
    head.side = side
    backbone = lazy_backbone(cfg, "RepPoints", source="res5")
    lazy = lazy_detector(RepPointsDetector, backbone, head, cfg, keys)
    lazy.transform = keys.TRANSFORM
    return lazy
