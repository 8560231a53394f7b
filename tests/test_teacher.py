from __future__ import annotations

import pytest
import torch
from torch import nn

from pcka.teacher import FrozenTeacher

IMAGES = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())


def test_stays_in_eval_mode(model):
    teacher = FrozenTeacher(model)
    outer = nn.ModuleList([teacher]).train()
    assert outer.training
    assert not any(module.training for module in teacher.modules())


def test_nothing_of_it_changes_or_learns(model):
    teacher = FrozenTeacher(model).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = teacher(IMAGES), teacher(IMAGES.clone().requires_grad_())
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not first.requires_grad and not second.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_gives_what_the_model_gives(model):
    expected = model.eval()(IMAGES)
    torch.testing.assert_close(FrozenTeacher(model)(IMAGES), expected)


def test_channels_last_reaches_weights_and_images(model):
    expected = model.eval()(IMAGES)
    seen = []
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    teacher = FrozenTeacher(model, channels_last=True)
    torch.testing.assert_close(teacher(IMAGES), expected)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_model_put_into_training_mode_behind_its_back_goes_to_eval_mode_again(model):
    teacher = FrozenTeacher(model)
    expected, before = teacher(IMAGES), model[1].running_mean.clone()
    model.train()
    torch.testing.assert_close(teacher(IMAGES), expected, rtol=0, atol=0)
    assert torch.equal(model[1].running_mean, before)
    assert not any(module.training for module in model.modules())
