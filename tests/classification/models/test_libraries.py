"""Models of timm and transformers, and of a module of one's own."""

from __future__ import annotations

import sys

import pytest
import torch

from classification.models import create_model, load_classifier, named_model
from classification.models.stage_search import find_stages
from pcka.engine.config import ConfigError

MODULE = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, width=4, bias=True):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, 6, 3, 2, 1)
        self.head = nn.Linear(6, num_classes, bias=bias)

    def forward(self, images):
        features = self.body(self.stem(images).relu())
        return {"features": features, "scores": self.head(features.mean((2, 3)))}


def ten():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def tokens():
    return "no module"
"""
IMAGES = torch.zeros(2, 3, 32, 32)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module in the working folder, forgotten afterwards."""
    (tmp_path / "nets_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "nets_of_mine"
    sys.modules.pop("nets_of_mine", None)


def test_a_factory_of_ones_own_gets_the_classes_and_the_keywords(mine):
    model = named_model(
        f"{mine}:Net", 7, role="student", kwargs={"width": 8, "bias": False}, logits="scores"
    )
    assert (model.stem.out_channels, model.head.bias) == (8, None)
    assert model(IMAGES).shape == (2, 7)
    find_stages(model)
    assert model.stage_names == ("stem", "body")
    assert (model.classifier_name, model.pooled_name) == ("head", "head:input")


def test_a_factory_that_takes_no_classes_is_called_without(mine):
    assert create_model(f"{mine}:ten", 7)(IMAGES).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("{}:Nett", {}, r"STUDENT\.NAME: 'nets_of_mine' has no function .*did you mean Net\?"),
        ("{}:tokens", {}, r"STUDENT\.NAME: nets_of_mine:tokens gives str, expected a torch"),
        ("{}:Net", {"widht": 8}, r"STUDENT\.KWARGS: .*cannot be made with.*'widht'"),
        (
            "{}:Net",
            {"num_classes": 3},
            r"STUDENT\.KWARGS: num_classes .* of the data; leave it out",
        ),
        ("no_such_nets:Net", {}, r"STUDENT\.NAME: 'no_such_nets' cannot be imported"),
        ("my/nets.py:Net", {}, r"NAME: 'my/nets.py' cannot be .*; did you mean 'my\.nets'\?"),
        ("resnet8", {"widht": 8}, r"STUDENT\.KWARGS: resnet8 cannot be made with .*'widht'"),
        ("torchvision/resnet18", {"a": 1}, r"STUDENT\.KWARGS: torchvision/resnet18 cannot .*'a'"),
    ],
)
def test_what_cannot_be_made_is_refused_by_its_key(mine, name, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        named_model(name.format(mine), 7, role="student", kwargs=kwargs)


def test_logits_that_are_not_there_are_refused_beside_what_there_is(mine):
    model = create_model(f"{mine}:Net", 7)
    with pytest.raises(ValueError, match=r"LOGITS: Net returns dict without a tensor 'logits'; .*"):
        model(IMAGES)
    model = named_model(f"{mine}:Net", 7, role="student", logits="score")
    with pytest.raises(ValueError, match=r"without a tensor 'score'; .*features, scores"):
        model(IMAGES)


def test_keywords_reach_the_zoo_and_torchvision():
    half = create_model("torchvision/mobilenet_v2", 3, width_mult=0.5)
    assert half.features[1].conv[1].out_channels == 8
    assert create_model("vgg8", 3, depths=(2, 1, 1, 1, 1)).block0[3].out_channels == 64


@pytest.mark.parametrize("name", ["timm/resnet18", "hf/some/model"])
def test_a_library_that_is_not_there_is_named_with_the_way_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"is not installed; run pip install 'pcka\[(timm|hf)\]'"):
        create_model(name, 7)


def test_a_model_of_timm_takes_keywords_and_near_names_are_proposed():
    pytest.importorskip("timm")
    size = {"img_size": 32, "patch_size": 8, "depth": 2}
    model = named_model("timm/vit_tiny_patch16_224", 7, role="teacher", kwargs=size)
    assert model(IMAGES).shape == (2, 7)
    find_stages(model, 32)
    assert model.stage_names == ("patch_embed:map", "blocks.0:map", "blocks.1:map")
    with pytest.raises(ConfigError, match=r"TEACHER\.NAME: timm .*'vit_tiny'; did you .*timm/vit_"):
        named_model("timm/vit_tiny", 7, role="teacher")


@pytest.fixture
def folder_of_transformers(tmp_path):
    """A tiny ViT of three classes with its weights, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=16, image_size=32, patch_size=8, num_labels=3
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit", model


def test_a_folder_of_transformers_gives_its_model_and_its_weights(folder_of_transformers):
    folder, original = folder_of_transformers
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = original(images).logits
        model = create_model(f"hf/{folder}", 3).eval()
        torch.testing.assert_close(model(images), expected)
        assert create_model(f"hf/{folder}", 5, pretrained=False)(images).shape == (2, 5)
        torch.save(model.state_dict(), folder / "run.pth")
        loaded = load_classifier(f"hf/{folder}", folder / "run.pth", 3, role="teacher").eval()
        torch.testing.assert_close(loaded(images), expected)
    find_stages(model, 32)
    assert len(model.stage_names) == 3 and all(":map" in path for path in model.stage_names[1:])
    assert model.classifier_name == "classifier"


def test_a_folder_of_transformers_that_does_not_fit_is_refused(folder_of_transformers, tmp_path):
    folder, _ = folder_of_transformers
    with pytest.raises(ConfigError, match=r"TEACHER\.NAME: transformers cannot .*pretrained: fal"):
        named_model(f"hf/{folder}", 5, role="teacher")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"TEACHER\.NAME: the folder .*holds no config\.json"):
        named_model(f"hf/{tmp_path / 'empty'}", 5, role="teacher")
    with pytest.raises(ConfigError, match=r"TEACHER\.NAME: there is no folder './nowhere'"):
        named_model("hf/./nowhere", 5, role="teacher")
