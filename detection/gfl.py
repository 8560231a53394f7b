"""GFL from YAML, and its training (Li et al., "Generalized Focal Loss", NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.events import get_event_storage
from fvcore.nn import giou_loss
from omegaconf import DictConfig
from torch import Tensor, nn

from detection.atss import atss_match
from detection.gfl_model import GFLDetector, GFLHead
from detection.lazy import lazy_backbone, lazy_detector, lazy_head
from pcka.distributed import average_over_processes
from pcka.engine.config import ConfigError
from pcka.losses.densekd import quality_focal

BELOW = 0.1  # margin below the largest distance, in strides, so that a distance has two neighbours


@META_ARCH_REGISTRY.register()
def GFL(cfg: CfgNode) -> nn.Module:
    """Build GFL from ``MODEL.GFL``."""
    keys, lazy = cfg.MODEL.GFL, lazy_gfl(cfg)
    lazy.update(
        _target_=TrainedGFL,
        anchor_scale=keys.ANCHOR_SCALE,
        topk=keys.ATSS_TOPK,
        beta=keys.QUALITY_BETA,
        box_weight=keys.BOX_WEIGHT,
        edge_weight=keys.EDGE_WEIGHT,
    )
    return instantiate(lazy)


class TrainedGFL(GFLDetector):
    """:class:`GFLDetector` with its losses.

    ``loss_gfl_cls`` is the quality focal loss (equation 5): the target score of a point's class is
    the IoU of the box predicted there with the object's. ``loss_gfl_loc`` is ``1 - GIoU`` of that
    box and ``loss_gfl_dfl`` the distribution focal loss (equation 6), both weighted by the point's
    highest score. The first is divided by the number of points with an object, the others by the
    sum of the weights; both normalisers are averaged over all processes and at least 1.

    Args:
        anchor_scale, topk: passed to :func:`detection.atss.atss_match`.
        beta: exponent of the difference between score and IoU.
        box_weight, edge_weight: weights of the second and the third term.
        keywords: passed to :class:`GFLDetector`.
    """

    def __init__(
        self,
        *,
        anchor_scale: float,
        topk: int,
        beta: float,
        box_weight: float,
        edge_weight: float,
        **keywords: Any,
    ) -> None:
        super().__init__(**keywords)
        self.anchor_scale, self.topk, self.beta = anchor_scale, topk, beta
        self.box_weight, self.edge_weight = box_weight, edge_weight

    def forward_training(  # type: ignore[override]
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: Sequence[Sequence[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Loss terms of a batch, in float32 even under autocast."""
        rows = self._transpose_dense_predictions(predictions, [self.num_classes, self.numbers])
        logits, edges = (torch.cat(levels, 1).float() for levels in rows)
        anchors = self.anchor_generator(features)
        matches = [
            atss_match(anchors, image.gt_boxes, scale=self.anchor_scale, topk=self.topk)
            for image in gt_instances
        ]
        return self._terms(Boxes.cat(anchors).tensor, logits, edges, matches, gt_instances)

    def _terms(
        self,
        points: Tensor,
        logits: Tensor,
        edges: Tensor,
        matches: Sequence[Tensor],
        gt_instances: Sequence[Instances],
    ) -> dict[str, Tensor]:
        image, place = (torch.stack(list(matches)) >= 0).nonzero(as_tuple=True)
        get_event_storage().put_scalar("num_pos_anchors", len(place) / len(logits))
        chosen = [match[match >= 0] for match in matches]
        wanted = torch.cat([o.gt_boxes.tensor[own] for o, own in zip(gt_instances, chosen)])
        classes = torch.cat([o.gt_classes[own] for o, own in zip(gt_instances, chosen)])
        seen, at = edges[image, place].unflatten(-1, (4, -1)), points[place]
        boxes = self.box2box_transform.apply_deltas(self.distances(seen), at)
        quality = torch.zeros_like(logits)
        overlaps = matched_pairwise_iou(Boxes(boxes.detach()), Boxes(wanted))
        quality[image, place, classes] = overlaps.to(quality.dtype)
        weights = logits.detach()[image, place].amax(-1).sigmoid()
        counts = torch.stack([weights.new_tensor(float(len(place))), weights.sum()])
        average_over_processes([counts])
        positives, total = counts.clamp_min(1)
        distances = self.box2box_transform.get_deltas(at, wanted)
        spread = distribution_focal_loss(seen, distances).mean(1)
        return {
            "loss_gfl_cls": quality_focal(logits, quality, self.beta).sum() / positives,
            "loss_gfl_loc": self.box_weight * (weights * giou_loss(boxes, wanted)).sum() / total,
            "loss_gfl_dfl": self.edge_weight * (weights * spread).sum() / total,
        }


def distribution_focal_loss(edges: Tensor, distances: Tensor) -> Tensor:
    r"""Cross-entropy of the two integers around each distance ``y``, weighted by their nearness.

    ``-((y_+ - y) log p(y_-) + (y - y_-) log p(y_+))`` (Li et al. 2020, equation 6).

    Args:
        edges: ``(..., N)`` logits over the distances ``0 .. N - 1``.
        distances: ``(...)`` targets; clamped to ``[0, N - 1.1]``.

    Returns:
        ``(...)``, in the dtype of the logits.
    """
    wanted = distances.clamp(0, edges.shape[-1] - 1 - BELOW)[..., None]
    left = wanted.floor()
    log = F.log_softmax(edges, -1)
    below, above = (log.gather(-1, left.long() + step) for step in (0, 1))
    return -((left + 1 - wanted) * below + (wanted - left) * above).squeeze(-1)


def lazy_gfl(cfg: CfgNode) -> DictConfig:
    """Return the LazyConfig of the detector that the YAML keys describe, for inference.

    Raises:
        ConfigError: values that are invalid for GFL, or a backbone that a LazyConfig cannot
            describe.
    """
    keys = cfg.MODEL.GFL
    for key in ("REG_MAX", "ATSS_TOPK", "NUM_CONVS"):
        if keys[key] < 1:
            raise ConfigError(f"MODEL.GFL.{key}: expected 1 or more, got {keys[key]}")
    head = lazy_head(GFLHead, cfg, keys)
    head.reg_max = keys.REG_MAX
    lazy = lazy_detector(GFLDetector, lazy_backbone(cfg, "GFL"), head, cfg, keys)
    lazy.reg_max = keys.REG_MAX
    return lazy
