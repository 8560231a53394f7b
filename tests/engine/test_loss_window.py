from __future__ import annotations

import pytest
import torch

from pcka.engine.loss_window import LossWindow, NonFiniteLossError


def terms(a, b):
    return ("loss_a", "loss_b"), torch.tensor([a, b])


def test_means_are_over_all_steps_however_often_they_are_read():
    window = LossWindow()
    window.add(*terms(1.0, 10.0))
    window.add(*terms(2.0, 20.0))
    assert window.read() == {"loss_a": 1.5, "loss_b": 15.0}
    window.add(*terms(6.0, 30.0))
    assert window.read() == window.read() == {"loss_a": 3.0, "loss_b": 20.0}


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_the_first_broken_step_is_named_with_its_terms(broken):
    window = LossWindow()
    window.add(*terms(1.0, 1.0))
    window.read()
    for loss in (2.0, broken, broken):
        window.add(*terms(5.0, loss))
    with pytest.raises(NonFiniteLossError, match=f"at step 3: loss_a=5, loss_b={broken:g}$"):
        window.read()
