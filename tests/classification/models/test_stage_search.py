from __future__ import annotations

import pytest
import torch
from torch import nn

from classification.models import create_model
from classification.models.taps import resolution_ends
from pcka.taps import FeatureTap


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision/shufflenet_v2_x0_5", ("conv1", "maxpool", "stage2", "stage3", "conv5")),
        ("torchvision/resnet18", ("relu", "layer1", "layer2", "layer3", "layer4")),
        (
            "torchvision/mobilenet_v3_small",
            ("features.0", "features.1", "features.3", "features.8", "features"),
        ),
    ],
)
def test_each_resolution_ends_at_its_outermost_last_module_and_can_be_tapped(name, expected):
    model = create_model(name, 2).train()
    assert resolution_ends(model) == expected
    assert model.training and not any(module._forward_hooks for module in model.modules())
    with FeatureTap(model.eval(), {path: path for path in expected}) as tap, torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
        sides = [feature.shape[-1] for feature in tap.pop().values()]
    assert sides == sorted(set(sides), reverse=True)


def test_what_is_overwritten_or_shared_is_passed_over():
    shared = nn.ReLU()
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), shared, nn.Conv2d(4, 4, 3, 1, 1), shared,
        nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(inplace=True), nn.Flatten(),
    )  # fmt: skip
    assert resolution_ends(model) == ("2", "5")


def test_a_model_that_takes_no_such_images_has_none():
    assert resolution_ends(nn.Linear(3, 4)) == ()
