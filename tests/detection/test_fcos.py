from __future__ import annotations

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import build_backbone, build_model

import detection.backbones  # noqa: F401  (registers itself)
from detection.config import PROJECT, load_config
from detection.fcos import lazy_fcos
from pcka.engine.config import ConfigError

STUDENT = str(PROJECT / "configs/detection/coco/fcos_r50/student.yaml")
R18 = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]


def _config(*overrides):
    return load_config(STUDENT, ["MODEL.DEVICE", "cpu", *R18, *overrides])


def test_p6_is_made_from_p5():
    model = build_model(_config())
    assert model.backbone.top_block.in_feature == "p5"
    assert model.backbone.top_block.p6.weight.shape[1] == 256
    assert model.head_in_features == ["p3", "p4", "p5", "p6", "p7"]


def test_the_lazy_config_describes_the_same_model():
    cfg = _config("MODEL.FCOS.NUM_CLASSES", "7")
    one, other = build_model(cfg).eval(), instantiate(lazy_fcos(cfg)).eval()
    other.load_state_dict(one.state_dict())
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        pairs = zip(one.backbone(image).values(), other.backbone(image).values(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    assert one.num_classes == other.num_classes == 7


def test_a_teachers_backbone_is_that_of_the_whole_model():
    cfg = _config()
    whole, alone = build_model(cfg).backbone.eval(), build_backbone(cfg).eval()
    alone.load_state_dict(whole.state_dict())
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        expected, found = whole(image), alone(image)
    assert list(found) == list(expected)
    assert all(torch.equal(found[level], expected[level]) for level in expected)


@pytest.mark.parametrize(
    "overrides",
    [
        ("MODEL.RESNETS.NUM_GROUPS", "32"),
        ("MODEL.RESNETS.RES2_OUT_CHANNELS", "128"),
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", "32"),
        ("MODEL.RESNETS.RES5_DILATION", "2"),
        ("MODEL.FPN.P6P7.IN_FEATURE", "res5"),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    ],
)
def test_a_backbone_that_the_lazy_config_does_not_describe_is_refused(overrides):
    with pytest.raises(ConfigError, match=f"{overrides[0]}: FCOS takes ResNets of the usual wid"):
        build_model(_config(*overrides))
