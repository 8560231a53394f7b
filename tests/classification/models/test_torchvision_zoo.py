from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from classification.models import create_model, model_names
from pcka.checkpoint import load_weights
from pcka.taps import FeatureTap

SIDE = 64


def images(side: int = SIDE) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, side, side)


def test_every_classification_model_is_there():
    known = torchvision.models.list_models(module=torchvision.models)
    assert {"resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "vit_b_16"} <= {*known}
    assert {f"torchvision/{name}" for name in known} <= set(model_names())


@pytest.mark.parametrize(
    "name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow), "mobilenet_v2"]
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_is_torchvisions_model(name, mode, tmp_path):
    """Same entries, same logits to the bit, same gradients, and its checkpoint loads as it is."""
    theirs = torchvision.models.get_model(name, weights=None, num_classes=7)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = create_model(f"torchvision/{name}", 7)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert load_weights(ours, tmp_path / "weights.pth").complete

    for model in (ours, theirs):
        getattr(model, mode)()
        if name == "mobilenet_v2":
            model.classifier[0].p = 0.0  # no two draws are alike
    logits = [model(images(32)) for model in (ours, theirs)]
    assert torch.equal(*logits)
    for values in logits:
        values.square().sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_stages_are_those_of_each_resolution():
    shapes = {
        "resnet18": [(64, 32), (64, 16), (128, 8), (256, 4), (512, 2)],
        "mobilenet_v2": [(32, 32), (24, 16), (32, 8), (96, 4), (320, 2)],
    }
    for name, expected in shapes.items():
        model = create_model(f"torchvision/{name}", 7).eval()
        with FeatureTap(model, {path: path for path in model.stage_names}) as tap:
            model(images())
            assert [(f.shape[1], f.shape[2]) for f in tap.pop().values()] == expected


def test_vgg_stages_end_before_the_poolings():
    with torch.device("meta"):
        plain, normed = (create_model(f"torchvision/{name}", 7) for name in ("vgg11", "vgg11_bn"))
    assert plain.preactivation_names == tuple(f"{path}:input" for path in plain.stage_names)
    for model in (plain, normed):
        activations = [model.get_submodule(path) for path in model.stage_names]
        assert len(activations) == 5
        assert not any(activation.inplace for activation in activations)
    assert plain.preactivation_norms == ("",) * 5
    for path in normed.preactivation_norms:
        assert isinstance(normed.get_submodule(path), nn.BatchNorm2d)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_copy_is_a_model_of_its_own(name):
    model = create_model(f"torchvision/{name}", 7).eval()
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.layer4[-1].conv1.weight)
    assert not torch.equal(model(images()), twin(images()))
    assert twin.stage_names == model.stage_names


def test_pooled_features_come_before_the_dropout():
    """In training the dropout would make them another thing than what it is in evaluation."""
    with torch.device("meta"):
        model = create_model("torchvision/mobilenet_v3_small", 7)
    dropout, classifier = model.classifier[2], model.get_submodule(model.classifier_name)
    assert classifier is model.classifier[3]
    assert model.pooled_name == "classifier.2:input"
    assert not dropout.inplace


def test_models_of_unknown_stages_say_so_by_having_none():
    with torch.device("meta"):
        squeezenet = create_model("torchvision/squeezenet1_1", 7)
        densenet = create_model("torchvision/densenet121", 7)
    for model in (squeezenet, densenet):
        assert model.stage_names == model.preactivation_names == model.preactivation_norms == ()
    assert (densenet.classifier_name, densenet.pooled_name) == ("classifier", "classifier:input")
    assert (squeezenet.classifier_name, squeezenet.pooled_name) == ("", "")


def test_auxiliary_heads_are_kept_silent():
    model = create_model("torchvision/googlenet", 7).train()
    assert any(name.startswith("aux1.") for name in model.state_dict())
    logits = model(images())
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in model.aux1.parameters())


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_pretrained_loads_all_but_the_layers_of_other_classes(monkeypatch, name):
    torch.manual_seed(0)
    state = torchvision.models.get_model(name, weights=None).state_dict()
    asked = []
    monkeypatch.setattr(
        torchvision.models.WeightsEnum,
        "get_state_dict",
        lambda weights, **_: asked.append(weights) or state,
    )
    model = create_model(f"torchvision/{name}", 5, pretrained=True)
    assert asked == [torchvision.models.get_model_weights(name).DEFAULT]
    own = model.state_dict()
    other = {key for key, value in own.items() if not torch.equal(value, state[key])}
    assert {"fc.weight", "fc.bias"} <= other and own["fc.weight"].shape[0] == 5
    assert all(key.startswith("fc.") or ".fc2." in key for key in other)
    same = create_model(f"torchvision/{name}", 1000, pretrained=True).state_dict()
    assert all(torch.equal(same[key], value) for key, value in state.items())


def test_a_model_of_other_widths_takes_no_published_weights(monkeypatch):
    state = torchvision.models.resnet50(weights=None).state_dict()
    weights = torchvision.models.WeightsEnum
    monkeypatch.setattr(weights, "get_state_dict", lambda weights, **_: state)
    with pytest.raises(ValueError, match=r"do not fit this resnet50: layer1\.0\.bn1\.bias differs"):
        create_model("torchvision/resnet50", 5, pretrained=True, width_per_group=128)


def test_weights_that_cannot_be_loaded_are_named(monkeypatch):
    def fail(weights, **_):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fail)
    with pytest.raises(ValueError, match=r"^kwargs: torchvision cannot load ResNet18.*no route"):
        create_model("torchvision/resnet18", 5, pretrained=True)
