"""Folded batch norms leave outputs and taps as they were, and what cannot be folded alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from classification.models import create_model
from classification.models.taps import model_taps
from pcka.taps import FeatureTap
from pcka.teacher import fold_batch_norms

# Of each family one: with and without pre-activation, depthwise and grouped convolutions, dense
# ones with a bias, and the two shapes of block.
ZOO = (
    "resnet8", "resnet20_option_a", "ResNet50", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1",
    "ShuffleV2", "MobileNetV1", "torchvision/resnet18", "torchvision/mobilenet_v2",
    "torchvision/densenet121", "torchvision/efficientnet_b0",
)  # fmt: skip
UNFOLDED = {"wrn_16_1", "torchvision/densenet121"}  # norms before convolutions: some stay


def randomized(model: nn.Module) -> nn.Module:
    """In evaluation mode and float64, every batch norm with numbers of its own."""
    generator = torch.Generator().manual_seed(0)
    for norm in batch_norms(model).values():
        for tensor, low, high in (
            (norm.running_mean, -0.5, 0.5), (norm.running_var, 0.5, 1.5),
            (norm.weight, -1.5, 1.5), (norm.bias, -0.5, 0.5),
        ):  # fmt: skip
            tensor.data.uniform_(low, high, generator=generator)
    return model.double().eval()


def batch_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


@torch.no_grad()
def observed(model: nn.Module, paths: dict[str, str], images: Tensor) -> dict[str, Tensor]:
    with FeatureTap(model, paths) as tap:
        logits = model(images)
        return {"logits": logits, **{name: x.clone() for name, x in tap.pop().items()}}


def test_a_tapped_convolution_stays_as_it_is():
    """The stem of a wide ResNet is one of its stages, and its batch norm is in the next one."""
    torch.manual_seed(0)
    model = randomized(create_model("wrn_16_2", 10))
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    assert model.stage_names[0] == "conv1"
    paths = {"conv1": "conv1", "first": "block1.layer.0"}
    expected, norms = observed(model, paths, images), batch_norms(model)
    folded = fold_batch_norms(model, tapped=paths.values())
    assert "block1.layer.0.bn1" in norms and "block1.layer.0.bn1" not in folded
    assert "block1.layer.0.bn2" in folded  # inside of what is tapped
    for tap, value in observed(model, paths, images).items():
        torch.testing.assert_close(value, expected[tap])


@pytest.mark.parametrize("name", ZOO)
def test_logits_and_taps_are_those_of_the_model(name):
    torch.manual_seed(0)
    model = randomized(create_model(name, 10))
    size = 32 if "/" not in name and name != "MobileNetV1" else 64
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    paths = {tap: path for tap, (path, _) in model_taps(model, model, []).items()}
    expected, norms = observed(model, paths, images), batch_norms(model)
    folded = fold_batch_norms(model)
    assert folded and set(folded) <= norms.keys()
    assert batch_norms(model).keys() == norms.keys() - set(folded)
    assert bool(batch_norms(model)) == (name in UNFOLDED)
    found = observed(model, paths, images)
    for tap, value in expected.items():
        assert (found[tap] - value).norm() <= 1e-12 * value.norm(), tap


def test_in_float32_the_outputs_differ_by_rounding_alone():
    torch.manual_seed(0)
    model = randomized(create_model("resnet20", 10)).float()
    images = torch.rand(4, 3, 32, 32)
    before = observed(model, {}, images)["logits"]
    fold_batch_norms(model)
    after = observed(model, {}, images)["logits"]
    assert (after - before).norm() <= 1e-5 * before.norm()
    assert not torch.equal(after, before)


class Net(nn.Module):
    """A convolution with a bias and its norm; ``forward`` is what the tests vary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class TwoReaders(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class ConvolutionTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.other(self.conv(x.flip(3)))


class NormTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(self.conv(x)))


class SomethingBetween(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).relu())


class ByKeyword(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.conv(input=x))


class StandardizedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / w.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, w, self.bias)


class Standardized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = StandardizedConv2d(3, 4, 3)


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else x


IMAGES = torch.linspace(-1, 2, 2 * 3 * 6 * 6, dtype=torch.float64).sin().view(2, 3, 6, 6)


def test_scale_and_shift_go_into_the_convolution():
    model = randomized(Net())
    w, b = model.conv.weight.clone(), model.conv.bias.clone()
    mean, var = model.norm.running_mean, model.norm.running_var
    s = model.norm.weight / (var + model.norm.eps).sqrt()
    expected = s[:, None, None, None] * w, (b - mean) * s + model.norm.bias
    output = model(IMAGES)
    assert fold_batch_norms(model) == ["norm"]
    torch.testing.assert_close((model.conv.weight, model.conv.bias), expected)
    torch.testing.assert_close(model(IMAGES), output)
    assert type(model.norm) is nn.Identity
    assert model.conv.stride == (2, 2)


@pytest.mark.parametrize(
    "kind",
    [TwoReaders, ConvolutionTwice, NormTwice, SomethingBetween, ByKeyword, Standardized, Branching],
)
def test_what_a_fold_would_change_stays_as_it_is(kind):
    torch.manual_seed(0)
    model = randomized(kind())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert fold_batch_norms(model) == []
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert isinstance(model.norm, nn.BatchNorm2d)


def test_a_norm_without_statistics_of_its_own_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert fold_batch_norms(model) == []
    assert isinstance(model[1], nn.BatchNorm2d)


def test_a_norm_without_scale_and_shift_is_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False))
    model[1].running_mean.uniform_()
    model.double().eval()
    output = model(IMAGES)
    assert fold_batch_norms(model) == ["1"]
    torch.testing.assert_close(model(IMAGES), output)


def test_a_model_in_training_mode_is_refused():
    model = randomized(Net())
    model.norm.train()  # one module is enough: it would use the statistics of the batch
    with pytest.raises(ValueError, match=r"model must be in evaluation mode.*call \.eval\(\)"):
        fold_batch_norms(model)
    assert isinstance(model.norm, nn.BatchNorm2d)


class ReadsElsewhere(nn.Module):
    """Reads a weight of its convolution or batch norm a second time."""

    def __init__(self, which: str):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.which = which

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.which == "norm":
            return y * self.norm.weight.view(1, -1, 1, 1)
        return y + nn.functional.conv2d(x, self.conv.weight)


def pruned():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    prune.l1_unstructured(layers[0], "weight", amount=0.5)
    return layers


def hooked():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    layers[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    return layers


@pytest.mark.parametrize(
    "make", [pruned, hooked, partial(ReadsElsewhere, "conv"), partial(ReadsElsewhere, "norm")]
)
def test_layers_that_something_else_reads_or_changes_stay(make):
    model = make().eval()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_var.fill_(4)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x).detach()
    assert fold_batch_norms(model) == []
    assert torch.equal(model(x), expected)
