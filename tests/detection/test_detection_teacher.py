"""The teacher's backbone: what it runs, and what it is given."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import Tensor, nn

from detection.config import teacher_config
from detection.teacher import TeacherBackbone, fold_batch_norms


@pytest.fixture
def backbone(small_config):
    """``backbone(norm)``: a trained teacher's backbone would be like it, statistics and all."""

    def make(norm):
        wanted = small_config("pcka", "DISTILL.TEACHER.OPTS", str(["MODEL.RESNETS.NORM", norm]))
        torch.manual_seed(0)
        built = build_backbone(teacher_config(wanted)).eval()
        for module in built.modules():
            if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
                for tensor in (module.weight.data, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias.data, module.running_mean):
                    tensor.normal_(std=0.1)
        return built

    return make


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_folded_batch_norms_give_the_same_features(backbone, norm):
    whole = backbone(norm)
    folded = fold_batch_norms(copy.deepcopy(whole))
    kinds = {type(module) for module in folded.modules()}
    assert not kinds & {nn.BatchNorm2d, FrozenBatchNorm2d}
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = whole(images), folded(images)
    for level, feature in expected.items():
        assert feature.std() > 0
        torch.testing.assert_close(found[level], feature, rtol=1e-4, atol=1e-4 * feature.std())


def test_other_norms_stay_where_they_are(backbone):
    model = nn.Sequential(
        Conv2d(3, 4, 1, norm=nn.GroupNorm(2, 4)),
        Conv2d(4, 4, 1, norm=nn.BatchNorm2d(4, track_running_stats=False)),
    )
    fold_batch_norms(model)
    assert [type(conv.norm) for conv in model] == [nn.GroupNorm, nn.BatchNorm2d]


def test_a_teacher_folds_its_batch_norms_and_is_frozen(backbone):
    teacher = TeacherBackbone(backbone("FrozenBN"), [0.0] * 3, [1.0] * 3)
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


class _CountsUploads(Tensor):
    """An image that counts how often it is brought to a device as it came from the loader."""

    uploads = 0

    def to(self, *args, **kwargs):
        _CountsUploads.uploads += 1
        return self.as_subclass(Tensor).to(*args, **kwargs)


def test_an_image_travels_to_the_device_once_for_both_models(build, batch, storage):
    model = build().train()
    expected = model(batch)
    counted = [{**x, "image": x["image"].as_subclass(_CountsUploads)} for x in batch]
    terms = model(counted)
    assert _CountsUploads.uploads == len(batch)
    assert expected.keys() == terms.keys()
    torch.testing.assert_close(terms["loss_pcka_p3_rows"], expected["loss_pcka_p3_rows"])
