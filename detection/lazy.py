"""Detectors described by a LazyConfig: ResNet, FPN, and a head like that of FCOS."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from detectron2.config import CfgNode, LazyCall
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from omegaconf import DictConfig

from detection.pyramid import P6P7
from pcka.engine.config import ConfigError


def lazy_detector(
    make: Callable[..., Any], backbone: DictConfig, head: DictConfig, cfg: CfgNode, keys: CfgNode
) -> DictConfig:
    """Return the LazyConfig of a detector with the parameters of detectron2's FCOS.

    Args:
        make: the detector's class.
        backbone: from :func:`lazy_backbone`.
        head: from :func:`lazy_head`.
        cfg: the whole configuration.
        keys: the detector's section of it.
    """
    return LazyCall(make)(
        backbone=backbone,
        head=head,
        head_in_features=list(keys.IN_FEATURES),
        num_classes=keys.NUM_CLASSES,
        test_score_thresh=keys.SCORE_THRESH_TEST,
        test_topk_candidates=keys.TOPK_CANDIDATES_TEST,
        test_nms_thresh=keys.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=list(cfg.MODEL.PIXEL_MEAN),
        pixel_std=list(cfg.MODEL.PIXEL_STD),
    )


def lazy_head(make: Callable[..., Any], cfg: CfgNode, keys: CfgNode) -> DictConfig:
    """Return the LazyConfig of a head with the parameters of detectron2's ``FCOSHead``."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return LazyCall(make)(
        input_shape=[LazyCall(ShapeSpec)(channels=channels) for _ in keys.IN_FEATURES],
        conv_dims=[channels] * keys.NUM_CONVS,
        num_classes=keys.NUM_CLASSES,
        norm=keys.NORM,
        prior_prob=keys.PRIOR_PROB,
    )


def lazy_backbone(cfg: CfgNode, detector: str, *, source: str = "p5") -> DictConfig:
    """Return the LazyConfig of the backbone that the YAML keys describe.

    Args:
        cfg: configuration whose ``MODEL`` is read.
        detector: name of the detector, for messages.
        source: the map that P6 is made from, ``"p5"`` or ``"res5"``.

    Raises:
        ConfigError: a backbone that a LazyConfig of detectron2's stages cannot describe.
    """
    _check_backbone(cfg, detector, source)
    resnet, channels = cfg.MODEL.RESNETS, cfg.MODEL.FPN.OUT_CHANNELS
    basic = resnet.DEPTH in (18, 34)
    stages = LazyCall(ResNet.make_default_stages)(depth=resnet.DEPTH, norm=resnet.NORM)
    if not basic:
        stages.stride_in_1x1 = resnet.STRIDE_IN_1X1
    bottom_up = LazyCall(ResNet)(
        stem=LazyCall(BasicStem)(in_channels=3, out_channels=64, norm=resnet.NORM),
        stages=stages,
        out_features=list(cfg.MODEL.FPN.IN_FEATURES),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return LazyCall(FPN)(
        bottom_up=bottom_up,
        in_features=list(cfg.MODEL.FPN.IN_FEATURES),
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=_lazy_top_block(cfg, source),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _lazy_top_block(cfg: CfgNode, source: str) -> DictConfig:
    """P6 and P7; detectron2's own class where it fits."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    keys = {
        "in_channels": channels if source == "p5" else 8 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS,
        "out_channels": channels,
        "in_feature": source,
    }
    if cfg.MODEL.FPN.P6P7.RELU:
        return LazyCall(LastLevelP6P7)(**keys)
    return LazyCall(P6P7)(**keys, relu=False)


def _check_backbone(cfg: CfgNode, detector: str, source: str) -> None:
    """Refuse keys that the stages and the pyramid of :func:`lazy_backbone` do not support."""
    basic = cfg.MODEL.RESNETS.DEPTH in (18, 34)
    expected = {
        "BACKBONE.NAME": "build_p6p7_resnet_fpn_backbone",
        "RESNETS.NUM_GROUPS": 1,
        "RESNETS.WIDTH_PER_GROUP": 64,
        "RESNETS.STEM_OUT_CHANNELS": 64,
        "RESNETS.RES2_OUT_CHANNELS": 64 if basic else 256,
        "RESNETS.RES5_DILATION": 1,
        "RESNETS.DEFORM_ON_PER_STAGE": [False] * 4,
        "FPN.P6P7.IN_FEATURE": source,
    }
    for key, wanted in expected.items():
        given = reduce(getattr, key.split("."), cfg.MODEL)
        if given != wanted:
            raise ConfigError(
                f"MODEL.{key}: {detector} takes ResNets of the usual widths, with P6 and P7 made "
                f"from {source}, which is {wanted!r} here; got {given!r}"
            )
