"""FCOS from YAML: detectron2 has the model, but configures it only through LazyConfigs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.fcos import FCOS as FCOSModel
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.structures import Boxes, ImageList, Instances
from omegaconf import DictConfig
from torch import Tensor, nn

from detection.lazy import lazy_backbone, lazy_detector, lazy_head


@META_ARCH_REGISTRY.register()
def FCOS(cfg: CfgNode) -> nn.Module:
    """Build FCOS (Tian et al., ICCV 2019) from ``MODEL.FCOS``."""
    lazy = lazy_fcos(cfg)
    lazy._target_ = TrainedFCOS
    return instantiate(lazy)


class TrainedFCOS(FCOSModel):
    """detectron2's FCOS, made trainable under autocast and on images without objects."""

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: Sequence[Sequence[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Loss terms of a batch, in float32; boxes decoded in bfloat16 would be pixels off."""
        exact = [[level.float() for level in levels] for levels in predictions]
        return super().forward_training(images, features, exact, gt_instances)

    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Boxes] | list[Tensor]]:
        """Return the class and box of every anchor; release 0.6 fails on images without objects.

        The boxes have detectron2's type: ``Boxes`` in 0.6, tensors ``(R, 4)`` in main.
        """
        return super().label_anchors(anchors, [_with_a_box(image) for image in gt_instances])


def _with_a_box(instances: Instances) -> Instances:
    """Give an image without objects an empty one: no anchor lies in it, all are background."""
    if len(instances):
        return instances
    device = instances.gt_boxes.device
    boxes, classes = torch.zeros(1, 4, device=device), torch.zeros(1, dtype=torch.int64)
    return Instances(instances.image_size, gt_boxes=Boxes(boxes), gt_classes=classes.to(device))


def lazy_fcos(cfg: CfgNode) -> DictConfig:
    """Return the LazyConfig of the model that the YAML keys describe.

    Raises:
        ConfigError: a backbone that a LazyConfig of detectron2's stages cannot describe.
    """
    keys = cfg.MODEL.FCOS
    head, backbone = lazy_head(FCOSHead, cfg, keys), lazy_backbone(cfg, "FCOS")
    lazy = lazy_detector(FCOSModel, backbone, head, cfg, keys)
    lazy.center_sampling_radius = keys.CENTER_SAMPLING_RADIUS
    lazy.focal_loss_alpha = keys.FOCAL_LOSS_ALPHA
    lazy.focal_loss_gamma = keys.FOCAL_LOSS_GAMMA
    return lazy
