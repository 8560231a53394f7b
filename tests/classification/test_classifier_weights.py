from __future__ import annotations

import re

import pytest
import torch

from classification.models import create_model
from classification.weights import load_classifier


@pytest.fixture
def weights(tmp_path):
    torch.save(create_model("resnet8", 7).state_dict(), tmp_path / "seven.pth")
    return tmp_path / "seven.pth"


def test_weights_fill_the_model(weights):
    model = load_classifier("resnet8", weights, 7, role="student")
    state = torch.load(weights)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_classifier_of_another_shape_is_refused_with_both_counts(weights, role):
    message = f"{role.upper()}.WEIGHTS: .*seven.pth' is a classifier of 7 classes, .* has 10"
    with pytest.raises(ValueError, match=message):
        load_classifier("resnet8", weights, 10, role=role)


def test_a_model_without_a_linear_layer_is_filled(tmp_path):
    name, path = "torchvision/squeezenet1_1", tmp_path / "squeezenet.pth"
    model = create_model(name, 3)
    torch.save(model.state_dict(), path)
    loaded = load_classifier(name, path, 3, role="student")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_densenets_published_names_are_understood(tmp_path):
    name, path = "torchvision/densenet121", tmp_path / "densenet.pth"
    model = create_model(name, 3)
    layer = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])")
    state = {layer.sub(r"\1.\2", key): value for key, value in model.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, path)
    loaded = load_classifier(name, path, 3, role="student")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_another_models_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"TEACHER.WEIGHTS: .* not the checkpoint of a resnet14"):
        load_classifier("resnet14", weights, 7, role="teacher")
