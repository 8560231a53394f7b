from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from classification import evaluation
from classification.data import PixelNormalize, ResidentSet
from classification.evaluation import accuracy, stage_alignment
from classification.models import create_model
from pcka.analysis import MinibatchCKA, u_centered_gram
from pcka.taps import FeatureTap


class ByFirstPixel(nn.Module):
    """Logits that rank the classes by their distance from the red value of the first pixel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("classes", torch.arange(classes))

    def forward(self, images):
        assert not self.training
        return -(self.classes - images[:, 0, 0, 0, None]).abs()


def numbered(values, labels, classes):
    images = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    return ResidentSet(images, torch.tensor(labels), tuple(map(str, range(classes))))


def test_top_1_and_top_5_are_percentages_of_all_images():
    pixels = PixelNormalize([0.0] * 3, [1 / 255] * 3)  # back to 0..255
    data = numbered([0, 9, 3, 4] * 100, [0, 9, 5, 9] * 100, 10)
    model = ByFirstPixel(10).train()
    assert accuracy(model, pixels, data) == {"top1": 50.0, "top5": 75.0}
    assert model.training


def test_modules_keep_their_own_modes():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5))
    model[2].eval()  # frozen while the rest is trained
    data = numbered([1, 2], [1, 2], 5)
    before = [module.training for module in model.modules()]
    accuracy(model, PixelNormalize([0.0] * 3, [1.0] * 3), data)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        accuracy(model, nn.AvgPool2d(2), data)
    assert [module.training for module in model.modules()] == before


def test_five_classes_have_no_top_5():
    pixels = PixelNormalize([0.0] * 3, [1 / 255] * 3)
    assert accuracy(ByFirstPixel(5), pixels, numbered([1, 1], [1, 2], 5)) == {"top1": 50.0}


def test_alignment_is_one_with_oneself_and_lower_under_other_pixel_statistics():
    torch.manual_seed(0)
    model = create_model("resnet8", 10)
    images = torch.randint(256, (30, 3, 16, 16), dtype=torch.uint8)
    data = ResidentSet(images, torch.zeros(30, dtype=torch.int64), ("a",))
    own, other = PixelNormalize([0.5] * 3, [0.2] * 3), PixelNormalize([0.1] * 3, [0.9] * 3)
    taps = {"stage1": ("layer1", "layer1"), "stage3": ("layer3", "layer3")}
    twin = copy.deepcopy(model)
    same = stage_alignment((own, model), (own, twin), taps, data)
    assert same == pytest.approx({"stage1": 1.0, "stage3": 1.0}, abs=1e-5)
    differing = stage_alignment((own, model), (other, twin), taps, data)
    assert all(value < 0.999 for value in differing.values())


def test_alignment_deals_a_sorted_set_out_over_its_batches(monkeypatch):
    seen = []

    def recorded(student, teacher, batches, taps):
        seen.extend((255 * images[:, 0, 0, 0]).round().int().tolist() for images in batches)
        return {}

    monkeypatch.setattr(evaluation, "layerwise_cka", recorded)
    monkeypatch.setattr(evaluation, "CKA_IMAGES", 11)
    monkeypatch.setattr(evaluation, "CKA_BATCH_SIZE", 4)
    data = numbered(range(31), [0] * 31, 1)
    stage_alignment((nn.Identity(), nn.Identity()), (nn.Identity(), nn.Identity()), {}, data)
    assert seen == [[0, 9, 18, 27], [3, 12, 21, 30], [6, 15, 24]]


def tapped(model, images):
    with FeatureTap(model, {"last": "layer3"}, keep=u_centered_gram) as tap:
        model(images)
        return tap.pop()


def test_alignment_over_several_batches_is_the_ratio_of_their_sums(monkeypatch):
    monkeypatch.setattr(evaluation, "CKA_BATCH_SIZE", 8)
    torch.manual_seed(0)
    student, teacher = create_model("resnet8", 10).eval(), create_model("resnet8", 10).eval()
    images = torch.randint(256, (24, 3, 16, 16), dtype=torch.uint8)
    data = ResidentSet(images, torch.zeros(24, dtype=torch.int64), ("a",))
    raw = PixelNormalize([0.0] * 3, [1.0] * 3)
    models = (raw, student), (raw, teacher)
    measured = stage_alignment(*models, {"last": ("layer3", "layer3")}, data)
    expected = MinibatchCKA(["last"], ["last"])
    with torch.no_grad():
        for start in range(3):
            batch = images[start::3] / 255
            expected.update(*(tapped(model, batch) for model in (student, teacher)))
    assert measured["last"] == pytest.approx(expected.compute().values.item(), rel=1e-6)
