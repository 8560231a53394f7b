from __future__ import annotations

import pytest
from torch import nn

from pcka.modes import evaluation_mode


@pytest.fixture
def model():
    """In training mode, but for a frozen batch norm."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[1].eval()
    return model


def modes(*models):
    return [module.training for model in models for module in model.modules()]


def test_all_modules_are_in_evaluation_mode_within_and_in_their_own_afterwards(model):
    other = nn.Dropout().eval()
    before = modes(model, other)
    with evaluation_mode(model, other):
        assert not any(modes(model, other))
    assert modes(model, other) == before == [True, True, False, True, False]


def test_the_modes_come_back_after_an_error(model):
    before = modes(model)
    with pytest.raises(RuntimeError, match="broken"), evaluation_mode(model):
        raise RuntimeError("broken")
    assert modes(model) == before
