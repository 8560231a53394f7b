"""SRRL against its equations in NumPy, and the teacher's classifier that it borrows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pcka import losses
from pcka.losses import Context, Outputs, srrl_loss

CHANNELS, WIDTH, CLASSES = 3, 5, 4


def _pair(draw, dtype=torch.float64):
    student = Outputs(features={"last": draw(0, 6, CHANNELS, 2, 3).to(dtype)})
    return student, Outputs(features={"pooled": draw(1, 6, WIDTH).to(dtype)})


def _prepared(draw, dtype=torch.float64, classifier=None, **settings):
    torch.manual_seed(0)
    classifier = classifier or nn.Linear(WIDTH, CLASSES)
    loss = losses.build("SRRL", **settings)
    loss.prepare(*_pair(draw, dtype), Context(teacher_classifier=classifier))
    return loss


def _numpy(tensor):
    return tensor.detach().numpy()


def _squares(f_s, f_t, weight, bias):
    """Mean squared differences of the features and of the logits."""
    z_s, z_t = (f @ weight.T + bias for f in (f_s, f_t))
    return np.mean((f_s - f_t) ** 2), np.mean((z_s - z_t) ** 2)


def test_srrl_loss_is_the_weighted_sum_of_both_differences(draw):
    student, teacher = draw(0, 6, WIDTH), draw(1, 6, WIDTH)
    classifier = nn.Linear(WIDTH, CLASSES).double()
    features, logits = _squares(
        student.numpy(), teacher.numpy(), _numpy(classifier.weight), _numpy(classifier.bias)
    )
    loss = srrl_loss(student, teacher, classifier, feature_weight=2.0, regression_weight=0.3)
    assert loss.item() == pytest.approx(2 * features + 0.3 * logits, rel=1e-12)


def test_module_connects_pools_and_classifies(draw):
    loss = _prepared(draw)
    student, teacher = _pair(draw)
    weight = _numpy(loss.connector[0].weight)[:, :, 0, 0]
    x = np.einsum("oc,bchw->bohw", weight, student.features["last"].numpy())
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    pooled = np.maximum((x - mean) / np.sqrt(variance + 1e-5), 0).mean((2, 3))
    classifier = _numpy(loss.classifier.weight), _numpy(loss.classifier.bias)
    expected = sum(_squares(pooled, teacher.features["pooled"].numpy(), *classifier))
    terms = loss(student, teacher, None)
    assert terms.keys() == {"loss_srrl"}
    assert terms["loss_srrl"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_each_term_reaches_the_student_and_the_connector_alone(draw, weights):
    classifier = nn.Linear(WIDTH, CLASSES).double()
    loss = _prepared(
        draw, classifier=classifier, feature_weight=weights[0], regression_weight=weights[1]
    )
    student, teacher = _pair(draw)
    x, y = student.features["last"].requires_grad_(), teacher.features["pooled"].requires_grad_()
    loss(student, teacher, None)["loss_srrl"].backward()
    assert x.grad.norm() > 0
    assert all(parameter.grad.norm() > 0 for parameter in loss.parameters())
    assert y.grad is None
    assert all(p.grad is None for p in (*classifier.parameters(), *loss.classifier.parameters()))


def test_the_classifier_is_a_frozen_copy_beside_the_module(draw):
    classifier = nn.Sequential(nn.Dropout(), nn.Linear(WIDTH, CLASSES))
    loss = _prepared(draw, classifier=classifier).train()
    assert classifier.training
    assert classifier[1].weight.requires_grad
    assert classifier[1].weight.dtype == torch.float32
    assert not any(module.training for module in loss.classifier.modules())
    assert {name.split(".")[0] for name in loss.state_dict()} == {"connector"}
    assert len(list(loss.parameters())) == len(list(loss.connector.parameters()))


def test_the_classifier_follows_moves_and_casts(draw):
    module = nn.ModuleList([_prepared(draw, torch.float32)])
    assert module.double()[0].classifier.weight.dtype == torch.float64
    assert module.to("meta")[0].classifier.weight.device.type == "meta"


def test_bfloat16_in_and_out_of_autocast(draw):
    student, teacher = _pair(draw, torch.bfloat16)
    loss = _prepared(draw, torch.bfloat16, classifier=nn.Linear(WIDTH, CLASSES).bfloat16())
    exact = loss(student, teacher, None)["loss_srrl"]
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, None)["loss_srrl"]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=2e-2, atol=0)


def test_an_unprepared_loss_says_so(draw):
    with pytest.raises(RuntimeError, match=r"SRRL is not prepared.*Distiller\.prepare"):
        losses.build("SRRL")(*_pair(draw), None)


def test_the_classifier_is_needed(draw):
    with pytest.raises(ValueError, match=r"context\.teacher_classifier: SRRL needs it"):
        losses.build("SRRL").prepare(*_pair(draw))


def test_the_student_needs_a_map(draw):
    student = Outputs(features={"last": draw(0, 6, CHANNELS)})
    context = Context(teacher_classifier=nn.Linear(WIDTH, CLASSES))
    with pytest.raises(ValueError, match=r"stage must name a feature map.*'last' has \(6, 3\)"):
        losses.build("SRRL").prepare(student, _pair(draw)[1], context)


def test_features_of_other_widths_are_refused(draw):
    with pytest.raises(ValueError, match=r"one shape \(B, D\); got student \(6, 4\).*1x1"):
        srrl_loss(draw(0, 6, 4), draw(1, 6, 5), nn.Linear(5, 2).double())
