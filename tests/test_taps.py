from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pcka.taps import FeatureTap


class Net(nn.Module):
    """Two stages, one activation shared by both, and a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)
        self.relu = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(5, 6, 1), nn.ReLU(inplace=True))
        self.pair = nn.LSTM(6, 2)
        self.idle = nn.Linear(1, 1)

    def forward(self, x):
        x = self.block(self.relu(self.conv2(self.relu(self.conv1(x)))))
        self.pair(x.mean((2, 3)))
        return x


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


IMAGES = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_gives_the_outputs_of_the_named_modules(net):
    with FeatureTap(net, {"first": "conv1", "last": "block.1"}) as tap:
        output = net(IMAGES)
        features = tap.pop()
    assert list(features) == ["first", "last"]
    torch.testing.assert_close(features["first"], net.conv1(IMAGES))
    assert features["last"] is output


def test_gives_the_input_of_a_module(net):
    with FeatureTap(net, {"images": "conv1:input", "middle": "block:input"}) as tap:
        net(IMAGES)
        features = tap.pop()
    assert features["images"] is IMAGES
    torch.testing.assert_close(features["middle"], net.conv2(net.conv1(IMAGES).relu()).relu())


def test_input_and_output_of_one_module_are_two_taps(net):
    net.block[1].inplace = False
    with FeatureTap(net, {"before": "block.1:input", "after": "block.1"}) as tap:
        net(IMAGES)
        features = tap.pop()
    assert features["before"].min() < 0
    assert torch.equal(features["before"].relu(), features["after"])
    features["before"].sum().backward()
    assert net.conv1.weight.grad.norm() > 0


def test_features_keep_their_graph_and_no_grad_is_respected(net):
    with FeatureTap(net, {"first": "conv1"}) as tap:
        net(IMAGES)
        tap.pop()["first"].sum().backward()
        assert net.conv1.weight.grad is not None
        with torch.no_grad():
            net(IMAGES)
        assert not tap.pop()["first"].requires_grad
        with torch.inference_mode():
            net(IMAGES)
        assert tap.pop()["first"].is_inference()


def test_what_is_kept_of_a_feature_is_made_before_anything_changes_it():
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True))
    x = torch.randn(4, 3)
    with FeatureTap(net, {"linear": "0"}, keep=lambda feature: feature.sum(1)) as tap:
        net(x)
        torch.testing.assert_close(tap.pop()["linear"], net[0](x).sum(1))


def test_memory_format_is_kept(net):
    net = net.to(memory_format=torch.channels_last)
    with FeatureTap(net, {"first": "conv1"}) as tap:
        net(IMAGES.contiguous(memory_format=torch.channels_last))
        feature = tap.pop()["first"]
    assert feature.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(feature, net.conv1(IMAGES))


@pytest.mark.parametrize("leave", ["remove", "with", "error"])
def test_leaves_no_hooks_behind(net, leave):
    tap = FeatureTap(net, {"first": "conv1", "before": "block:input", "last": "block"})
    assert hooks(net) == 3
    if leave == "remove":
        tap.remove()
        tap.remove()
    elif leave == "with":
        with tap:
            pass
    else:
        with pytest.raises(ZeroDivisionError), tap:
            raise ZeroDivisionError
    assert hooks(net) == 0


def test_pop_clears(net):
    with FeatureTap(net, {"first": "conv1"}) as tap:
        net(IMAGES)
        tap.pop()
        with pytest.raises(RuntimeError, match=r"tap 'first': module 'conv1' did not run since"):
            tap.pop()


@pytest.mark.parametrize("path", ["idle", "idle:input"])
def test_a_module_that_never_runs_is_named(net, path):
    with FeatureTap(net, {"quiet": path}) as tap:
        net(IMAGES)
        with pytest.raises(RuntimeError, match="tap 'quiet': module 'idle' did not run"):
            tap.pop()


def test_two_forward_passes_without_pop_are_refused(net):
    with FeatureTap(net, {"first": "conv1"}):
        net(IMAGES)
        with pytest.raises(RuntimeError, match="tap 'first': module 'conv1' ran twice"):
            net(IMAGES)


@pytest.mark.parametrize("path", ["relu", "relu:input"])
def test_a_module_shared_within_the_model_is_refused(net, path):
    with (
        FeatureTap(net, {"act": path}),
        pytest.raises(RuntimeError, match="module 'relu' ran twice"),
    ):
        net(IMAGES)


def test_an_output_changed_in_place_is_refused(net):
    with FeatureTap(net, {"pre": "block.0"}) as tap:
        net(IMAGES)
        with pytest.raises(RuntimeError, match=r"module 'block\.0' was changed in place"):
            tap.pop()


def test_an_input_changed_in_place_is_refused(net):
    with FeatureTap(net, {"pre": "block.1:input"}) as tap:
        net(IMAGES)
        with pytest.raises(RuntimeError, match=r"input of module 'block\.1' was .*inplace=False"):
            tap.pop()


def test_an_input_that_is_no_tensor_is_refused(net):
    message = "module 'idle' got as first positional argument {}, expected a tensor"
    with FeatureTap(net, {"in": "idle:input"}):
        with pytest.raises(ValueError, match=message.format("list")):
            net.idle([IMAGES])
        with pytest.raises(ValueError, match=message.format("NoneType")):
            net.idle(input=IMAGES)


def test_an_output_that_is_no_tensor_is_refused(net):
    with (
        FeatureTap(net, {"pair": "pair"}),
        pytest.raises(
            ValueError,
            match=r"'pair' returned tuple, expected a tensor; .*'pair:KEY'.*available: 0, 1\)",
        ),
    ):
        net(IMAGES)


def test_an_unknown_path_lists_near_matches_and_hooks_nothing(net):
    with pytest.raises(ValueError, match=r"tap 'a': Net has no module 'conv3'; near.*conv2"):
        FeatureTap(net, {"first": "conv1", "a": "conv3"})
    with pytest.raises(ValueError, match=r"no module 'conv3'; near.*conv2"):
        FeatureTap(net, {"a": "conv3:input"})
    assert hooks(net) == 0


def test_a_module_under_a_second_name_is_found(net):
    net.alias = net.conv1
    with FeatureTap(net, {"first": "alias"}) as tap:
        net(IMAGES)
        torch.testing.assert_close(tap.pop()["first"], net.conv1(IMAGES))


class Parts(nn.Module):
    """Gives a pyramid, as detectors' backbones do, and an object within it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Net()
        self.split = Split()

    def forward(self, x):
        x = self.backbone(x)
        return {"p3": x, "p4": x[:, :, ::2, ::2], 5: self.split(x)}


class Split(nn.Module):
    def forward(self, x):
        return SimpleNamespace(halves=x, parts=tuple(x.chunk(2)))


def test_parts_of_what_a_module_returns_are_read_by_key_number_and_attribute():
    model = Parts()
    paths = {"a": ":p3", "b": ":p4", "c": "split:halves", "d": "backbone.pair:0"}
    with FeatureTap(model, paths) as tap:
        output = model(IMAGES)
        features = tap.pop()
    assert features["a"] is output["p3"] and features["b"] is output["p4"]
    assert features["c"] is output[5].halves
    assert features["d"].shape == (2, 2)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (":p9", "the model returned dict without 'p9'; available: p3, p4, 5"),
        (":5", "the model returned SimpleNamespace, expected a tensor"),
        (
            "split:thirds",
            "'split' returned SimpleNamespace without 'thirds'; available: halves, parts",
        ),
        ("backbone.pair:2", "'backbone.pair' returned tuple without '2'; available: 0, 1"),
        ("", "the model returned dict, expected a tensor; .*':KEY' .available: p3, p4, 5"),
    ],
)
def test_a_part_that_is_not_there_is_named_beside_those_that_are(path, message):
    model = Parts()
    with FeatureTap(model, {"a": path}), pytest.raises(ValueError, match=f"tap 'a': .*{message}"):
        model(IMAGES)


def test_a_part_changed_in_place_is_refused():
    model = Parts()
    with FeatureTap(model, {"a": ":p3", "b": ":p4"}) as tap:
        model(IMAGES)["p3"].detach().add_(1)  # p4 is a view of it
        with pytest.raises(RuntimeError, match="the output of the model was changed in place"):
            tap.pop()
