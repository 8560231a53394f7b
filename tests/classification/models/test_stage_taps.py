"""The attributes that `register` asks of every model, over the whole zoo."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from classification.models import create_model, model_names
from classification.models.shufflenet import ShuffleNetV2
from classification.models.wrn import WideResNet
from pcka.taps import FeatureTap

ZOO = [name for name in model_names() if "/" not in name]
LINEAR_ROWS = ("MobileNetV2", "torchvision/mobilenet_v2")  # their stages end without an activation
TAPPED = [
    *ZOO,
    *(f"torchvision/{name}" for name in ("resnet18", "resnet50", "mobilenet_v2")),
]
SIDE = 32


def observe(model: nn.Module, paths: dict[str, str]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    images = torch.randn(2, 3, SIDE, SIDE, dtype=next(model.parameters()).dtype)
    with FeatureTap(model, paths) as tap:
        return model(images), tap.pop()


def stages_of(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The stages of an evaluation pass, and the same before their activation."""
    after = {f"after{i}": path for i, path in enumerate(model.stage_names)}
    before = {f"before{i}": path for i, path in enumerate(model.preactivation_names)}
    with torch.no_grad():
        features = observe(model.eval(), {**after, **before})[1]
    return [features[name] for name in after], [features[name] for name in before]


def train_norms(model: nn.Module) -> nn.Module:
    """Give the batch norms weights and biases of their own, so that each is told from the next."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


@pytest.mark.parametrize("name", TAPPED)
def test_every_stage_has_a_feature_before_its_activation(name):
    model = train_norms(create_model(name, 7))
    after, before = stages_of(model)
    assert len(model.preactivation_names) == len(model.preactivation_norms) == len(after)
    for index, (stage, preactivation) in enumerate(zip(after, before, strict=True)):
        assert preactivation.shape == stage.shape
        assert preactivation.min() < 0
        if isinstance(model, WideResNet):
            # Its stages are sums, before the norm whose output this is.
            expected = model.get_submodule(model.preactivation_norms[index])(stage)
            torch.testing.assert_close(preactivation, expected)
        elif name in LINEAR_ROWS:
            # The stem ends with a ReLU or ReLU6, and the rows are features before one.
            expected = preactivation.clamp(0, 6 if "/" in name else None) if index == 0 else stage
            assert torch.equal(stage, expected if index == 0 else preactivation)
        else:
            assert torch.equal(stage, preactivation.relu())


@pytest.mark.parametrize("name", TAPPED)
def test_norms_give_the_last_term_of_the_feature(name):
    """As the bias of a norm rises, so does the feature, whatever else is added in it."""
    model = train_norms(create_model(name, 7)).double()
    before = stages_of(model)[1]
    for index, path in enumerate(model.preactivation_norms):
        if isinstance(model, ShuffleNetV2) and index > 0:
            assert path == ""
            continue
        norm = model.get_submodule(path)
        assert isinstance(norm, nn.BatchNorm2d)
        raised = torch.linspace(1, 2, norm.num_features).double()
        with torch.no_grad():
            norm.bias += raised
        risen = stages_of(model)[1][index]
        torch.testing.assert_close(risen, before[index] + raised.view(-1, 1, 1))
        with torch.no_grad():
            norm.bias -= raised


@pytest.mark.parametrize("name", [*TAPPED, "torchvision/shufflenet_v2_x0_5"])
def test_classifier_takes_the_pooled_features(name):
    model = create_model(name, 7).eval()
    logits, features = observe(model, {"pooled": model.pooled_name})
    assert logits.shape == (2, 7)
    classifier = model.get_submodule(model.classifier_name)
    assert isinstance(classifier, nn.Linear)
    assert features["pooled"].dim() == 2
    torch.testing.assert_close(classifier(features["pooled"]), logits)


@pytest.mark.parametrize("name", ["resnet8", "ShuffleV2", "torchvision/resnet18"])
def test_taps_hold_in_training(name):
    model = create_model(name, 7).train()
    paths = (*model.stage_names, *model.preactivation_names, model.pooled_name)
    logits, features = observe(model, {str(i): path for i, path in enumerate(paths)})
    (logits.sum() + sum(f.square().sum() for f in features.values())).backward()
    assert all(p.grad is not None for p in model.parameters())
