"""The feature pyramid of teachers whose P6 and P7 detectron2's configuration cannot describe.

Importing this module also registers the dilated backbones and their heads.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone, build_resnet_backbone

import detection.dilated  # noqa: F401  (registers itself)
from pcka.engine.config import ConfigError


@BACKBONE_REGISTRY.register()
def build_p6p7_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """ResNet and FPN, with P6 and P7 from ``MODEL.FPN.P6P7``; unknown to plain detectron2.

    Raises:
        ConfigError: P6 is not made from C5 (``res5``) or P5.
    """
    from detection.pyramid import P6P7  # most runs use another pyramid

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
