from __future__ import annotations

import re

import pytest
import torch

from classification.models import create_model
from classification.models.weights import load_classifier
from pcka.engine.config import ConfigError


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


def test_weights_of_a_library_are_the_way_out_for_other_classes(tmp_path):
    torch.save(create_model("torchvision/resnet18", 7).state_dict(), tmp_path / "seven.pth")
    told = r"or, without WEIGHTS, TEACHER\.KWARGS '\{pretrained: true\}' \(a new classifier\)$"
    with pytest.raises(ConfigError, match=told):
        load_classifier("torchvision/resnet18", tmp_path / "seven.pth", 10, role="teacher")


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


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda value: value * float("nan"), "has NaN or infinite values"),
        (lambda value: value.to(torch.int8), "is torch.int8"),
        (lambda value: value > 0, "is torch.bool"),
        (lambda value: value.to(torch.complex64), "is torch.complex64"),
    ],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_what_is_no_weight_is_refused_with_key_file_and_entry(weights, change, fault, role):
    state = torch.load(weights)
    state["layer1.0.conv1.weight"] = change(state["layer1.0.conv1.weight"])
    torch.save(state, weights)
    expected = rf"^{role.upper()}\.WEIGHTS: .*seven\.pth': 1 of .* layer1\.0\.conv1\.weight {fault}"
    with pytest.raises(ConfigError, match=expected):
        load_classifier("resnet8", weights, 7, role=role)


def test_a_flipped_bit_is_found(weights):
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 4
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match=r"TEACHER\.WEIGHTS: expected .*\.pth' is damaged"):
        load_classifier("resnet8", weights, 7, role="teacher")


def test_a_classifier_without_a_shape_is_no_classifier(weights):
    state = torch.load(weights)
    state["fc.weight"] = torch.tensor(1.0)
    torch.save(state, weights)
    with pytest.raises(ConfigError, match=r"fc\.weight \(\) for \(7, 64\)"):
        load_classifier("resnet8", weights, 7, role="student")
