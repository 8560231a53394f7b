"""The feature pyramid of teachers whose P6 and P7 detectron2's configuration cannot describe.

The dilated trunks and the heads on them are registered with it.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import Tensor
from torch.nn import functional as F

import detection.dilated  # noqa: F401  (registers itself)
from pcka.engine.config import ConfigError


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


@BACKBONE_REGISTRY.register()
def build_p6p7_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """ResNet and FPN, with P6 and P7 as ``MODEL.FPN.P6P7`` says; plain detectron2 has no such name.

    Raises:
        ConfigError: P6 from another map than C5 (``res5``) or P5.
    """
    keys = cfg.MODEL.FPN
    source = keys.P6P7.IN_FEATURE
    if source not in ("res5", "p5"):
        raise ConfigError(
            f"MODEL.FPN.P6P7.IN_FEATURE: expected 'res5' (C5) or 'p5' (P5), got {source!r}"
        )
    bottom_up = build_resnet_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()["res5"].channels if source == "res5" else keys.OUT_CHANNELS
    return FPN(
        bottom_up=bottom_up,
        in_features=keys.IN_FEATURES,
        out_channels=keys.OUT_CHANNELS,
        norm=keys.NORM,
        top_block=P6P7(channels, keys.OUT_CHANNELS, source, relu=keys.P6P7.RELU),
        fuse_type=keys.FUSE_TYPE,
    )
