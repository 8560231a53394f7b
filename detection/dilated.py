"""Dilated backbones and the heads of PSPNet and DeepLabV3, for a ``SemanticSegmentor``.

Importing this file registers them with detectron2. It depends only on torch, torchvision and
detectron2, and reads only detectron2's keys: exports include a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.modeling.backbone import Backbone, ResNet, build_resnet_backbone
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.fcn import FCNHead

__all__ = ["ASPPHead", "PSPHead", "build_dilated_resnet_backbone"]  # the registered names

DILATIONS = {1: 32, 2: 16, 4: 8}  # dilation of res5 -> stride of the backbone
BINS = (1, 2, 3, 6)  # bins per side of PSPNet's pyramid
RATES = (12, 24, 36)  # DeepLabV3's dilations at stride 8; halved at stride 16
AUXILIARY_WEIGHT = 0.4


@BACKBONE_REGISTRY.register()
def build_dilated_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """ResNet of stride 32, 16 or 8, for ``MODEL.RESNETS.RES5_DILATION`` 1, 2 or 4.

    Strides are replaced by dilations: at 4, res5 has dilation 4 and res4 dilation 2. The weights
    are those of a plain ResNet. detectron2's own backbone supports 1 and 2, and only 1 for
    ResNet-18 and 34.

    Raises:
        ValueError: another dilation, or deformable convolutions.
    """
    keys = cfg.MODEL.RESNETS
    dilation = keys.RES5_DILATION
    if dilation not in DILATIONS or any(keys.DEFORM_ON_PER_STAGE):
        raise ValueError(
            "MODEL.RESNETS.RES5_DILATION: expected 1, 2 or 4 (a stride of 32, 16 or 8), without "
            f"deformable convolutions; got {dilation} and {keys.DEFORM_ON_PER_STAGE}"
        )
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.RESNETS.RES5_DILATION = 1
    resnet = build_resnet_backbone(plain, input_shape)
    stages = dict(zip(resnet.stage_names, resnet.stages))
    for name, own in (("res4", dilation // 2), ("res5", dilation)):
        if own > 1 and name in stages:
            _dilate(stages[name], own)
    blocks = [list(stage) for stage in stages.values()]
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    return ResNet(resnet.stem, blocks, out_features=keys.OUT_FEATURES, freeze_at=freeze_at)


def _dilate(stage: nn.Module, dilation: int) -> None:
    block: Any
    for block in stage.children():
        block.stride = 1
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (dilation, dilation)


class PyramidPooling(nn.Module):
    """A map concatenated with its means over 1, 4, 9 and 36 bins (Zhao et al., CVPR 2017).

    Args:
        in_channels: channels of the map.
        channels: channels of each pooled map, and of the output.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), *_convolved(in_channels, channels, 1))
            for side in BINS
        )
        width = in_channels + len(BINS) * channels
        self.project = nn.Sequential(*_convolved(width, channels, 3), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, channels, H, W)``."""
        size = x.shape[2:]
        means = [
            F.interpolate(part(x), size, mode="bilinear", align_corners=False)
            for part in self.parts
        ]
        return self.project(torch.cat([x, *means], 1))


def _convolved(in_channels: int, channels: int, side: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, channels, side, padding=side // 2, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU()]


class DilatedHead(nn.Module):
    """Class scores from the backbone's last map, with an optional auxiliary loss on an earlier one.

    The head reads ``MODEL.SEM_SEG_HEAD``: ``IN_FEATURES`` names the map, preceded by that of the
    auxiliary loss if there is one; ``CONVS_DIM`` is the width before the last layer;
    ``COMMON_STRIDE`` is the backbone's stride; ``NORM`` is "BN", or "SyncBN" across processes.

    Args:
        cfg: detectron2's configuration.
        input_shape: shapes of the backbone's maps.
        context: channels of a map and of the result -> the layers between.

    Raises:
        ValueError: inconsistent keys.
    """

    def __init__(
        self,
        cfg: CfgNode,
        input_shape: Mapping[str, ShapeSpec],
        context: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        keys = cfg.MODEL.SEM_SEG_HEAD
        _check(keys, input_shape)
        *others, self.main = keys.IN_FEATURES
        self.auxiliary_of = others[0] if others else ""
        self.common_stride = keys.COMMON_STRIDE
        self.ignore_value = keys.IGNORE_VALUE
        self.loss_weight = keys.LOSS_WEIGHT
        self.context = _normed(context(input_shape[self.main].channels, keys.CONVS_DIM), keys.NORM)
        self.predictor = nn.Conv2d(keys.CONVS_DIM, keys.NUM_CLASSES, 1)
        if self.auxiliary_of:
            width = input_shape[self.auxiliary_of].channels
            self.auxiliary = _normed(FCNHead(width, keys.NUM_CLASSES), keys.NORM)

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        """Class scores ``(B, K, H, W)`` at the backbone's stride."""
        return self.predictor(self.context(features[self.main]))

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """``(None, losses)`` in training, ``(scores at the images' size, {})`` in inference.

        Args:
            features: the backbone's maps.
            targets: ``(B, H, W)`` int64, the class of each pixel.
        """
        scores = self.layers(features)
        if not self.training:
            return self._upsampled(scores), {}
        losses = {"loss_sem_seg": self.loss_weight * self._loss(scores, targets)}
        if self.auxiliary_of:
            early = self._loss(self.auxiliary(features[self.auxiliary_of]), targets)
            losses["loss_sem_seg_aux"] = AUXILIARY_WEIGHT * self.loss_weight * early
        return None, losses

    def _upsampled(self, scores: Tensor) -> Tensor:
        return F.interpolate(
            scores, scale_factor=self.common_stride, mode="bilinear", align_corners=False
        )

    def _loss(self, scores: Tensor, targets: Any) -> Tensor:
        """Mean cross-entropy over the pixels that have a class; 0 if none has."""
        height, width = targets.shape[1:]
        scores = self._upsampled(scores.float())[:, :, :height, :width]
        ignored = self.ignore_value
        total = F.cross_entropy(scores, targets, reduction="sum", ignore_index=ignored)
        return total / (targets != ignored).sum().clamp(min=1)


@SEM_SEG_HEADS_REGISTRY.register()
def PSPHead(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> nn.Module:
    """The head of PSPNet (Zhao et al., CVPR 2017)."""
    return DilatedHead(cfg, input_shape, PyramidPooling)


@SEM_SEG_HEADS_REGISTRY.register()
def ASPPHead(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> nn.Module:
    """The head of DeepLabV3 (Chen et al., 2017), built from torchvision's layers."""
    stride = cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE
    rates = [max(1, rate * 8 // stride) for rate in RATES]
    return DilatedHead(cfg, input_shape, lambda width, channels: ASPP(width, rates, channels))


def _check(keys: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> None:
    if len(keys.IN_FEATURES) not in (1, 2):
        raise ValueError(
            "MODEL.SEM_SEG_HEAD.IN_FEATURES: expected the trunk's last map, or an earlier one and "
            f"that, e.g. ['res4', 'res5']; got {keys.IN_FEATURES}"
        )
    if missing := [name for name in keys.IN_FEATURES if name not in input_shape]:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES: the backbone gives {', '.join(input_shape)}, but not "
            f"{missing[0]!r}; see MODEL.RESNETS.OUT_FEATURES"
        )
    if (stride := input_shape[keys.IN_FEATURES[-1]].stride) != keys.COMMON_STRIDE:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE: is {keys.COMMON_STRIDE}, but "
            f"{keys.IN_FEATURES[-1]!r} has a stride of {stride}; use that, or change "
            "MODEL.RESNETS.RES5_DILATION"
        )
    if keys.NORM not in ("BN", "SyncBN"):
        raise ValueError(f"MODEL.SEM_SEG_HEAD.NORM: expected 'BN' or 'SyncBN', got {keys.NORM!r}")


def _normed(module: nn.Module, norm: str) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(module) if norm == "SyncBN" else module
