"""Trunks with dilations in the place of strides, and the heads on them."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from torch.nn import functional as F
from torchvision.models import resnet50

from detection.config import build_student, load_config
from detection.dilated import DilatedHead, PyramidPooling
from pcka.engine.config import ConfigError

HEADS = ("PSPHead", "ASPPHead")


@pytest.fixture
def config():
    """``config(depth, dilation)``: of a small segmenter on a dilated trunk."""

    def make(depth=50, dilation=4, head="PSPHead"):
        cfg = get_cfg()
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
        cfg.MODEL.BACKBONE.NAME = "build_dilated_resnet_backbone"
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        resnet, keys = cfg.MODEL.RESNETS, cfg.MODEL.SEM_SEG_HEAD
        resnet.DEPTH, resnet.RES5_DILATION, resnet.NORM = depth, dilation, "BN"
        resnet.RES2_OUT_CHANNELS, resnet.WIDTH_PER_GROUP = (64, 64) if depth == 18 else (16, 4)
        resnet.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        keys.NAME, keys.IN_FEATURES, keys.NORM = head, ["res4", "res5"], "BN"
        keys.NUM_CLASSES, keys.CONVS_DIM, keys.COMMON_STRIDE = 3, 8, 32 // dilation
        return cfg

    return make


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize(("dilation", "strides"), [(1, (16, 32)), (2, (16, 16)), (4, (8, 8))])
def test_strides_are_what_the_maps_have(config, depth, dilation, strides):
    backbone = build_backbone(config(depth, dilation)).eval()
    shapes = backbone.output_shape()
    assert (shapes["res4"].stride, shapes["res5"].stride) == strides
    maps = backbone(torch.zeros(1, 3, 65, 96))
    for name, shape in shapes.items():
        assert maps[name].shape == (1, shape.channels, -(-65 // shape.stride), 96 // shape.stride)


@torch.no_grad()
def test_a_dilation_of_2_gives_the_maps_of_detectron2s_own(config):
    cfg = config(50, 2)
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    ours = build_backbone(cfg).eval()
    theirs = BACKBONE_REGISTRY.get("build_resnet_backbone")(cfg, ShapeSpec(channels=3)).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 80)
    assert all(torch.equal(ours(images)[name], x) for name, x in theirs(images).items())


def test_a_dilation_of_4_dilates_as_torchvision_does_after_the_first_block(config):
    """torchvision's first block of a stage still has the dilation of the stage before."""
    reference = resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
    ours = build_backbone(config(50, 4))
    for stage, layer in (("res4", reference.layer3), ("res5", reference.layer4)):
        for own, other in zip(list(getattr(ours, stage))[1:], list(layer)[1:], strict=True):
            for name in ("stride", "dilation", "padding"):
                assert getattr(own.conv2, name) == getattr(other.conv2, name)
        assert getattr(ours, stage)[0].conv2.dilation == getattr(ours, stage)[1].conv2.dilation


@pytest.mark.parametrize("head", HEADS)
def test_an_early_map_has_a_loss_in_training_alone(config, head):
    model = build_model(config(18, head=head))
    classes = torch.randint(3, (67, 61))
    batch = [{"image": torch.rand(3, 67, 61), "sem_seg": classes, "height": 40, "width": 50}] * 2
    losses = model.train()(batch)
    assert losses.keys() == {"loss_sem_seg", "loss_sem_seg_aux"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.sem_seg_head.parameters())
    assert model.eval()(batch)[0]["sem_seg"].shape == (3, 40, 50)


def test_losses_are_means_over_the_pixels_with_a_class(config):
    torch.manual_seed(0)
    head = build_model(config(18)).sem_seg_head
    assert isinstance(head, DilatedHead)
    scores, targets = torch.randn(2, 3, 5, 4), torch.randint(3, (2, 33, 32))
    targets[0, :7] = 255
    expected = F.cross_entropy(
        F.interpolate(scores, scale_factor=8, mode="bilinear")[:, :, :33, :32],
        targets,
        ignore_index=255,
    )
    torch.testing.assert_close(head._loss(scores, targets), expected)
    assert head._loss(scores, torch.full_like(targets, 255)) == 0  # not NaN


def test_the_pyramid_has_means_over_parts_of_the_image():
    torch.manual_seed(0)
    pool = PyramidPooling(4, 3).eval()
    seen = []
    pool.project.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        assert pool(x).shape == (1, 3, 6, 6)
    assert torch.equal(seen[0][:, :4], x)
    whole, finest = seen[0][:, 4:7], seen[0][:, 13:]
    torch.testing.assert_close(whole, whole[:, :, :1, :1].expand_as(whole))  # one mean, everywhere
    torch.testing.assert_close(finest, pool.parts[3][1:](x))  # 6 x 6 parts of 6 x 6 positions


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("RESNETS", "RES5_DILATION", 3, r"RES5_DILATION: expected 1, 2 or 4"),
        ("RESNETS", "DEFORM_ON_PER_STAGE", [False, False, False, True], "without deformable"),
        ("SEM_SEG_HEAD", "IN_FEATURES", [], r"IN_FEATURES: expected the trunk's last map"),
        ("SEM_SEG_HEAD", "IN_FEATURES", ["res6"], r"IN_FEATURES: the backbone gives res2, .*res6"),
        ("SEM_SEG_HEAD", "COMMON_STRIDE", 4, r"COMMON_STRIDE: is 4, but 'res5' has .* of 8"),
        ("SEM_SEG_HEAD", "NORM", "GN", r"NORM: expected 'BN' or 'SyncBN', got 'GN'"),
    ],
)
def test_keys_that_do_not_go_together_are_named(tmp_path, config, section, key, value, message):
    (tmp_path / "small.yaml").write_text(config().dump())
    own = [f"MODEL.{section}.{key}", str(value)]
    with pytest.raises(ConfigError, match=message):
        build_student(load_config(str(tmp_path / "small.yaml"), own))
