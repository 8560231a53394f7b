from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from detection.run_state import RunState, lent_random_states


@pytest.fixture(autouse=True)
def _generators_are_given_back():
    with lent_random_states():
        yield


def draw():
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def older_states():
    """As older checkpoints hold them: plain lists, and one GPU's state by itself."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }


@pytest.mark.parametrize("form", ["today's", "older"])
def test_the_generators_go_on_from_a_checkpoint(tmp_path, form):
    state = RunState(nn.Module()).state_dict()
    if form == "older":
        state["random"] = older_states()
    expected = draw()
    torch.save(state, tmp_path / "state.pth")
    resumed = RunState(nn.Module())
    resumed.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    draw()
    resumed.restore_random()
    assert draw() == expected


def test_the_loss_normaliser_goes_on_from_a_checkpoint():
    student = nn.Module()
    student.loss_normalizer = 7.5
    state = RunState(student).state_dict()
    student.loss_normalizer = 1.0
    RunState(student).load_state_dict(state)
    assert student.loss_normalizer == 7.5


def test_lent_generators_come_back_as_they_were():
    with lent_random_states():
        expected = draw()
    assert draw() == expected
