"""The zoo against figures of the community's implementations (see the fixture's recipe)."""

from __future__ import annotations

import json
import os
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from classification.models import create_model
from pcka.checkpoint import load_weights

FIXTURE = Path(__file__).parents[2] / "fixtures" / "cifar_zoo.json"
ZOO = json.loads(FIXTURE.read_text())
IMAGENET = "MobileNetV1_imagenet"
OPTION_A = ("resnet20_option_a", "resnet56_option_a")


def _fill(model: nn.Module) -> None:
    """Give every entry values that follow from its own name."""
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        rng = np.random.RandomState(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            values = np.zeros(shape)
        elif name.endswith("running_var"):
            values = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("running_mean"):
            values = 0.1 * rng.randn(*shape)
        elif len(shape) == 1 and name.endswith("weight"):
            values = rng.uniform(0.2, 0.6, shape)
        elif len(shape) == 1:
            values = 0.1 * rng.randn(*shape)
        else:
            values = rng.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
        tensor.copy_(torch.as_tensor(values))


def _create(name: str) -> nn.Module:
    """The model of a record: for CIFAR-100, or for ImageNet where the name says so."""
    return create_model("MobileNetV1", 1000) if name == IMAGENET else create_model(name, 100)


def _images(side: int) -> Tensor:
    return torch.as_tensor(np.random.RandomState(0).randn(2, 3, side, side))


def _run_tapped(
    model: nn.Module, side: int = 32
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return the logits, and the tapped tensors as they are afterwards and were when tapped."""
    tapped, copies = {}, {}

    def record(name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        assert name not in tapped, f"{name} ran twice"
        tapped[name], copies[name] = output, output.clone()

    for name in (*model.stage_names, model.pooled_name):
        model.get_submodule(name).register_forward_hook(partial(record, name))
    with torch.no_grad():
        return model(_images(side)), tapped, copies


@pytest.mark.parametrize("name", ZOO)
def test_state_dict_has_the_community_names_in_order(name):
    model = _create(name)
    assert [[key, list(t.shape)] for key, t in model.state_dict().items()] == ZOO[name]["keys"]
    assert sum(p.numel() for p in model.parameters()) == ZOO[name]["params"]


@pytest.mark.parametrize("name", ZOO)
def test_forward_gives_the_community_figures(name):
    expected = ZOO[name]
    model = _create(name).double().eval()
    _fill(model)
    logits, tapped, copies = _run_tapped(model, 224 if name == IMAGENET else 32)

    # The fixture has 7 significant digits of a logit and 9 of a norm.
    np.testing.assert_allclose(logits[:, :10], expected["logits_first10"], rtol=1e-6)
    np.testing.assert_allclose(logits.norm(), expected["logits_norm"], rtol=1e-8)
    stages = [tapped[stage] for stage in model.stage_names]
    if name == IMAGENET:
        stages = stages[1:]  # its record has no stem
    assert [list(stage.shape) for stage in stages] == expected["stage_features"]
    np.testing.assert_allclose(
        [stage.norm() for stage in stages], expected["stage_norms"], rtol=1e-8
    )
    assert list(tapped[model.pooled_name].shape) == expected["pooled_shape"]
    for stage, tensor in tapped.items():
        assert torch.equal(tensor, copies[stage]), f"{stage} was changed after it was tapped"


@pytest.mark.parametrize("name", OPTION_A)
def test_option_a_has_no_shortcut_parameters_and_a_linear(name):
    expected = [
        [key.replace("fc.", "linear."), shape]
        for key, shape in ZOO[name.removesuffix("_option_a")]["keys"]
        if "downsample" not in key
    ]
    state = create_model(name, 100).state_dict()
    assert [[key, list(t.shape)] for key, t in state.items()] == expected


def test_option_a_shortcut_strides_and_pads_with_zero_channels():
    block = create_model("resnet20_option_a", 10).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # silences the branch, so that the block is its shortcut
    x = torch.rand(2, 16, 8, 8)
    output = block(x)
    assert output.shape == (2, 32, 4, 4)
    assert torch.equal(output[:, 8:24], x[:, :, ::2, ::2])
    assert output[:, :8].count_nonzero() == output[:, 24:].count_nonzero() == 0


def test_option_a_stages_are_tapped():
    model = create_model("resnet20_option_a", 10).double().eval()
    logits, tapped, _ = _run_tapped(model)
    shapes = [tuple(tapped[stage].shape[1:]) for stage in model.stage_names]
    assert shapes == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert logits.shape == (2, 10)


def test_convolutions_start_with_the_variance_of_their_fan_out():
    weight = create_model("ResNet18", 10).layer4[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.slow
def test_a_published_checkpoint_loads_whole():
    folder = os.environ.get("PCKA_TEST_DATA")
    path = Path(folder or "", "checkpoints", "resnet56-4bfd9763.th")
    if folder is None or not path.exists():
        pytest.skip("PCKA_TEST_DATA holds no checkpoints/resnet56-4bfd9763.th")
    model = create_model("resnet56_option_a", 10)
    report = load_weights(model, path)
    assert report.complete
    learned = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    assert list(report.loaded) == learned
    file = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    assert torch.equal(model.linear.weight, file["module.linear.weight"])


@pytest.mark.parametrize("name", ["vgg8", "wrn_16_1", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_larger_images_and_single_ones(name):
    model = create_model(name, 7).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_shuffling_interleaves_the_groups():
    channels = torch.arange(6.0).view(1, 6, 1, 1)
    shuffle = create_model("ShuffleV2", 10).get_submodule("layer1.0.shuffle")
    assert shuffle(channels).flatten().tolist() == [0, 3, 1, 4, 2, 5]
