from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka.losses import FitNet, Outputs

STAGES = ("a", "b")


@pytest.fixture
def outputs(draw):
    student = {"a": draw(0, 6, 3, 8, 8), "b": draw(1, 6, 3, 8, 8)}
    teacher = {"a": draw(2, 6, 5, 4, 4), "b": draw(3, 6, 4, 8, 8)}
    return Outputs(features=student), Outputs(features=teacher)


def test_published_setting():
    loss = FitNet()
    assert (loss.taps, loss.weights, loss.uses_regressor) == (("last",), (100.0,), True)


def test_student_goes_through_convolution_batch_norm_and_relu(outputs):
    student, teacher = outputs
    loss = FitNet(stages=("b",), weights=(2.0,))
    loss.prepare(*outputs)
    parameters = dict(loss.regressors["b"].named_parameters())
    weight, bias, gamma, beta = (
        parameters[name].detach().numpy() for name in ("0.weight", "0.bias", "1.weight", "1.bias")
    )
    y = np.einsum("bihw,oi->bohw", student.feature("b").numpy(), weight[:, :, 0, 0])
    y = y + bias[:, None, None]
    mean, variance = (f(y, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.var))
    y = (y - mean) / np.sqrt(variance + 1e-5) * gamma[:, None, None] + beta[:, None, None]
    expected = 2 * np.mean((np.maximum(y, 0) - teacher.feature("b").numpy()) ** 2)
    terms = loss(*outputs, None)
    assert list(terms) == ["loss_fitnet_b"]
    assert terms["loss_fitnet_b"].item() == pytest.approx(expected, rel=1e-10)


def test_every_stage_has_its_own_regressor_and_weight(outputs):
    loss = FitNet(stages=STAGES, weights=(2.0, 0.5))
    loss.prepare(*outputs)
    assert list(loss.regressors) == ["a", "b"]
    terms = loss(*outputs, None)
    double = FitNet(stages=STAGES, weights=(4.0, 1.0))
    double.prepare(*outputs)
    double.load_state_dict(loss.state_dict())
    for name, value in double(*outputs, None).items():
        torch.testing.assert_close(value, 2 * terms[name])


def test_maps_of_one_shape_need_no_regressor(draw):
    loss = FitNet(stages=("a",), regressor=False)
    student, teacher = draw(0, 2, 3, 4, 4), draw(1, 2, 3, 4, 4)
    pair = Outputs(features={"a": student}), Outputs(features={"a": teacher})
    loss.prepare(*pair)
    assert not list(loss.parameters())
    expected = 100 * np.mean((student.numpy() - teacher.numpy()) ** 2)
    assert loss(*pair, None)["loss_fitnet_a"].item() == pytest.approx(expected, rel=1e-12)


def test_prepare_needs_a_teacher(outputs):
    with pytest.raises(ValueError, match="teacher: FitNet needs it"):
        FitNet().prepare(outputs[0], None)
