"""Distillers and students in what frameworks wrap models in: compilation, data parallelism."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pcka import Distiller, FeatureTap, FrozenTeacher
from pcka.losses import CE, FCKA, KD, PKD, FitNet

IMAGES = torch.linspace(-2, 3, 6 * 3 * 8 * 8).sin().view(6, 3, 8, 8)
TARGET = torch.tensor([0, 1, 2, 3, 4, 0])
TAPS = {"last": "body"}


def net(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU()))
    model.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(9 * width, 5)))
    return model


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    """A group of this process alone."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "compiled and parallel": lambda model: DistributedDataParallel(compiled(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_paths_of_a_wrapped_model_are_those_of_the_model_itself(process_group, wrapper):
    losses = [CE(), KD(), FCKA(stages=["last"])]
    plain = Distiller(net(4), net(7), losses, TAPS)(IMAGES, TARGET)
    wrapped = Distiller(WRAPPERS[wrapper](net(4)), net(7), losses, TAPS)(IMAGES, TARGET)
    torch.testing.assert_close(wrapped, plain)


def test_paths_with_the_wrappers_own_name_stay_what_they_are():
    model = compiled(net(4))
    with FeatureTap(model, {"a": "_orig_mod.body"}) as tap:
        model(IMAGES)
        assert tap.pop()["a"].shape == (6, 4, 3, 3)
    with pytest.raises(ValueError, match=r"no module '_orig_mod.bodi'; near.*_orig_mod\.body"):
        FeatureTap(model, {"a": "_orig_mod.bodi"})


def test_a_compiled_teacher_is_tapped():
    losses = [KD(), FCKA(stages=["last"])]
    plain = Distiller(net(4), net(7), losses, TAPS)(IMAGES, TARGET)
    teacher = FrozenTeacher(compiled(net(7)))
    torch.testing.assert_close(Distiller(net(4), teacher, losses, TAPS)(IMAGES, TARGET), plain)


@pytest.mark.slow
def test_a_distiller_that_is_compiled_as_a_whole_gives_the_same_gradients():
    gradients = []
    for wrap in (lambda model: model, compiled):
        student = net(4)
        distiller = wrap(Distiller(student, net(7), [CE(), FCKA(stages=["last"])], TAPS))
        for _ in range(2):
            student.zero_grad()
            sum(distiller(IMAGES, TARGET).values()).backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_student_whose_gradients_alone_are_averaged_is_refused_beside_adapters(process_group):
    message = r"student: DistributedDataParallel averages only its gradients.*student\.module"
    distiller = Distiller(DistributedDataParallel(net(4)), net(7), [PKD(stages=["last"])], TAPS)
    with pytest.raises(ValueError, match=message):
        distiller.prepare(IMAGES)
    distiller = Distiller(DistributedDataParallel(net(4)), net(7), [FitNet(stages=["last"])], TAPS)
    with pytest.raises(ValueError, match=message):
        distiller.prepare(IMAGES)
    # Nothing but the student is trained here, and the distiller as a whole is wrapped here.
    Distiller(DistributedDataParallel(net(4)), net(7), [KD()]).prepare(IMAGES)
    distiller = Distiller(net(4), net(7), [PKD(stages=["last"])], TAPS)
    distiller.prepare(IMAGES)
    assert DistributedDataParallel(distiller)(IMAGES, TARGET)["loss_pkd_last"].isfinite()


@pytest.mark.parametrize("loss", [PKD, FitNet])
def test_a_state_with_parts_that_are_not_made_yet_names_what_makes_them(loss):
    source, target = (Distiller(net(4), net(7), [loss(stages=["last"])], TAPS) for _ in range(2))
    source.prepare(IMAGES)
    state = source.state_dict()
    with pytest.raises(ValueError, match=r"has no '(adapters|losses)\..*; give it .* prepare\(\)"):
        target.load_state_dict(state)
    target.load_state_dict(state, strict=False)
    target.prepare(IMAGES)
    target.load_state_dict(state)
    torch.testing.assert_close(target(IMAGES, TARGET), source(IMAGES, TARGET))
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict({})


def test_data_parallelism_without_processes_is_refused():
    distiller = Distiller(net(4), net(7), [KD()])
    with pytest.raises(
        ValueError, match=re.escape("wrap the distiller in DistributedDataParallel")
    ):
        distiller._replicate_for_data_parallel()  # what DataParallel calls for each of its devices
