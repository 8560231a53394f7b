from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from pcka import Distiller
from pcka.losses import Context, build
from pcka.taps import Observer, TapError

PATHS = {"map": "0", "before": "2:input", "pooled": "4"}


def small_model(width: int = 4) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 5),
    )


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_logits_and_features_of_one_pass_and_no_hooks_left():
    model, images = small_model(), torch.randn(2, 3, 8, 8)
    observed = Observer(model.eval(), PATHS)(images)
    torch.testing.assert_close(observed.logits, model(images))
    torch.testing.assert_close(observed.features["map"], model[0](images))
    torch.testing.assert_close(observed.features["before"], model[1](model[0](images)))
    assert observed.features["pooled"].shape == (2, 4)
    assert hooks(model) == 0


def test_paths_start_from_the_root():
    class Half(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

        def forward(self, images):
            return self.inner(images) / 2

    model, images = small_model().eval(), torch.randn(2, 3, 8, 8)
    observed = Observer(Half(model), PATHS, root=model)(images)
    torch.testing.assert_close(observed.logits, model(images) / 2)
    assert observed.features.keys() == PATHS.keys()


@pytest.mark.parametrize("compile", [False, True])
def test_an_unknown_path_is_refused_when_the_observer_is_made(compile):
    with pytest.raises(ValueError, match=r"no module 'nine'"):
        Observer(small_model(), {"map": "nine"}, compile=compile)


@pytest.fixture
def traced_only(monkeypatch):
    """What tracing does to hooks is at stake here, not the code that comes of it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_compiled_gives_the_same_outputs_and_gradients():
    """In training and in evaluation mode, and nothing is kept of other calls of the model."""
    images = torch.randn(4, 3, 8, 8)
    results = {}
    for compile in (False, True):
        model = small_model()
        observe = Observer(model, PATHS, compile=compile)
        for mode in (True, False):
            model.train(mode)
            observed = observe(images)
            features = [observed.features[name] for name in PATHS]
            model.zero_grad()
            torch.stack([x.square().sum() for x in (observed.logits, *features)]).sum().backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
            results[compile, mode] = [observed.logits, *features, *gradients]
    model(images)
    assert not observe._features
    for mode in (True, False):
        torch.testing.assert_close(results[True, mode], results[False, mode])


class Heads(nn.Module):
    """Takes two inputs and gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_model()

    def forward(self, images, scale):
        logits = self.model(images) * scale
        return {"logits": logits, "double": 2 * logits}


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("compile", [False, True])
def test_models_of_several_inputs_and_outputs_are_observed_as_they_are(compile):
    model, images = Heads().eval(), torch.randn(2, 3, 8, 8)
    observe = Observer(model, {"own": ":double", "map": "model.0"}, compile=compile)
    observed, again = observe(images, 3.0), observe(images, 3.0)
    torch.testing.assert_close(observed.logits, 3 * model.model(images))
    torch.testing.assert_close(observed.features["own"], 2 * observed.logits)
    torch.testing.assert_close(observed.features["map"], model.model[0](images))
    assert observed.raw.keys() == {"logits", "double"}
    torch.testing.assert_close(again.features, observed.features)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_a_compiled_distiller_gives_the_terms_of_the_eager_one():
    images, target = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    terms = {}
    for compile in (False, True):
        taps = {"last": ("2", "2:input"), "pooled": ("4", "4")}
        losses = [build("CE"), build("KD"), build("FCKA"), build("CRD", negatives=8)]
        distiller = Distiller(small_model(), small_model(6), losses, taps, compile=compile)
        torch.manual_seed(0)
        distiller.prepare(images, context=Context(train_labels=torch.arange(20) % 5))
        terms[compile] = distiller(images, target, indices=torch.arange(4))
        torch.stack(list(terms[compile].values())).sum().backward()
    torch.testing.assert_close(terms[True], terms[False])


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_compiled_observers_of_like_models_keep_their_own_taps():
    images = torch.randn(2, 3, 8, 8)
    for paths in ({}, {"a": "0"}, {"a": "2:input"}, {"a": "2:input", "b": "4"}):
        model = small_model().eval()
        observed = Observer(model, paths, compile=True)(images)
        expected = Observer(model, paths)(images)
        assert observed.features.keys() == paths.keys()
        torch.testing.assert_close(observed.features, expected.features)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_of_a_compiled_distiller_has_observers_of_its_own(duplicate):
    images, target = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    taps = {"last": ("2", "2:input"), "pooled": ("4", "4")}
    losses = [build("CE"), build("KD"), build("FCKA", stages=["last", "pooled"], weights=[1, 1])]
    distiller = Distiller(small_model(), small_model(6), losses, taps, compile=True)
    expected = distiller(images, target)
    twin = duplicate(distiller)
    torch.testing.assert_close(twin(images, target), expected)
    with torch.no_grad():
        for model in (twin.student, twin.teacher):
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    changed = twin(images, target)
    assert all((changed[name] - expected[name]).abs() > 1e-6 for name in expected)
    torch.testing.assert_close(distiller(images, target), expected)


class Shared(nn.Module):
    """Runs one of its layers twice, one in training mode only, and one never."""

    def __init__(self):
        super().__init__()
        self.twice, self.trained, self.never = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.twice(self.twice(x))
        return self.trained(x) if self.training else x


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("path", "message"), [("twice", "'twice' ran twice"), ("never", "'never' did not run")]
)
def test_a_module_that_does_not_run_once_is_refused(compile, path, message):
    with pytest.raises(TapError, match=message):
        Observer(Shared(), {"f": path}, compile=compile)(torch.ones(2, 4))


@pytest.mark.usefixtures("traced_only")
def test_a_module_that_runs_in_another_mode_only_is_refused_when_it_does_not():
    model = Shared()
    observer = Observer(model, {"f": "trained"}, compile=True)
    assert observer(torch.ones(2, 4)).features["f"].shape == (2, 4)
    model.eval()
    with pytest.raises(
        TapError, match=r"'trained' did not run; its model calls it in training mode"
    ):
        observer(torch.ones(2, 4))


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("compile", [False, True])
def test_a_feature_that_is_changed_in_place_is_refused(compile):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with pytest.raises(TapError, match="output of module '0' was changed in place"):
        Observer(model, {"f": "0"}, compile=compile)(torch.randn(8, 4))


@pytest.mark.usefixtures("traced_only")
def test_compiling_changes_neither_statistics_nor_random_numbers():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())
    twin = copy.deepcopy(model)
    x = torch.randn(8, 4)
    outputs = []
    for one, compile in ((model, True), (twin, False)):
        torch.manual_seed(0)
        outputs.append(Observer(one, {"f": "0"}, compile=compile)(x).raw)
    assert torch.equal(*outputs)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name])
