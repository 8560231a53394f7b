from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pcka.losses import CTKD, Outputs, ctkd_loss, kd_loss


def numpy_ctkd(student, teacher, temperature) -> complex:
    total = 0.0
    for s, t, each in zip(student, teacher, np.broadcast_to(temperature, len(student))):
        p_s, p_t = (np.exp(x / each) / np.exp(x / each).sum() for x in (s, t))
        total += each**2 * (p_t * (np.log(p_t) - np.log(p_s))).sum()
    return total / len(student)


@pytest.mark.parametrize("temperature", [3.0, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]])
def test_value_and_gradient_from_the_definition(draw, meets_numpy, temperature):
    meets_numpy(
        lambda s, t: ctkd_loss(s, t, torch.tensor(temperature).double()),
        lambda s, t: numpy_ctkd(s, t, temperature),
        draw(0, 6, 5, scale=3),
        draw(1, 6, 5, scale=3),
    )


@pytest.mark.parametrize("temperature", [3.0, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]])
def test_gradient_of_the_temperature_from_the_definition(draw, meets_numpy, temperature):
    student, teacher = draw(0, 6, 5, scale=3), draw(1, 6, 5, scale=3)
    meets_numpy(
        lambda t, _: ctkd_loss(student, teacher, t),
        lambda t, _: numpy_ctkd(student.numpy(), teacher.numpy(), t),
        torch.tensor(temperature).double(),
        teacher,
    )


def test_one_temperature_of_all_is_kd(draw):
    student, teacher = draw(0, 6, 5), draw(1, 6, 5)
    expected = kd_loss(student, teacher, temperature=3.0)
    torch.testing.assert_close(ctkd_loss(student, teacher, torch.tensor(3.0)), expected)


@pytest.fixture
def pair(draw):
    return Outputs(draw(0, 6, 5, scale=3)), Outputs(draw(1, 6, 5, scale=3))


def prepared(pair, **settings):
    torch.manual_seed(0)
    loss = CTKD(weight=1.0, **settings).double()
    loss.prepare(*pair)
    return loss


@pytest.mark.parametrize(("form", "raw"), [("global", 1.0), ("instance", 0.0)])
def test_the_first_temperature_is_that_of_the_start(pair, form, raw):
    temperature = 2 + 10 / (1 + math.exp(-raw))
    terms = prepared(pair, form=form, lowest=2.0, span=10.0)(*pair, None)
    assert list(terms) == ["loss_ctkd"]
    expected = kd_loss(pair[0].logits, pair[1].logits, temperature=temperature)
    torch.testing.assert_close(terms["loss_ctkd"], expected)


@pytest.mark.parametrize("form", ["global", "instance"])
def test_the_temperature_climbs_what_the_student_descends(pair, form):
    """After a step of descent on both, the loss of a student that stayed is larger."""
    loss = prepared(pair, form=form, curriculum_steps=1)
    before = loss(*pair, None)["loss_ctkd"]
    before.backward()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter -= 1e-2 * parameter.grad
    assert loss(*pair, None)["loss_ctkd"] > before


def test_gradient_is_reversed_by_a_factor_that_grows_with_the_training_steps(pair):
    loss = prepared(pair, curriculum_steps=4)
    raw, factors = loss.of_all, []
    for _ in range(6):
        raw.grad = None
        loss(*pair, None)["loss_ctkd"].backward()
        factors.append(raw.grad.item())
    plain = torch.tensor(1.0).double().requires_grad_()
    ctkd_loss(*(o.logits for o in pair), 1 + 20 * torch.sigmoid(plain)).backward()
    expected = [(1 - math.cos(math.pi * min(n, 4) / 4)) / 2 for n in range(1, 7)]
    assert [f / -plain.grad.item() for f in factors] == pytest.approx(expected, rel=1e-6)


def test_steps_count_in_training_alone_and_are_saved(pair):
    loss = prepared(pair).eval()
    loss(*pair, None)
    assert loss.steps == 0
    loss.train()
    loss(*pair, None)
    assert loss.state_dict()["steps"] == 1


def test_samples_have_temperatures_of_their_own_and_the_student_no_gradient_by_them(pair, draw):
    loss = prepared(pair, form="instance", curriculum_steps=1)
    with torch.no_grad():
        loss.of_each[2].weight.copy_(draw(2, 1, 256))
    student, teacher = pair[0].logits.requires_grad_(), pair[1].logits
    value = loss(*pair, None)["loss_ctkd"]
    (gradient,) = torch.autograd.grad(value, student)
    first, _, last = loss.of_each
    both = torch.cat([student.softmax(1), teacher.softmax(1)], dim=1).detach()
    hidden = (both @ first.weight.T + first.bias).clamp(min=0)
    temperature = 1 + 20 * torch.sigmoid((hidden @ last.weight.T + last.bias)[:, 0]).detach()
    assert temperature.max() - temperature.min() > 1
    expected = ctkd_loss(student, teacher, temperature)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


def test_gradient_reaches_only_the_student_and_the_temperature(draw):
    student, teacher = draw(0, 6, 5).requires_grad_(), draw(1, 6, 5).requires_grad_()
    temperature = torch.tensor(3.0).requires_grad_()
    ctkd_loss(student, teacher, temperature).backward()
    assert student.grad.norm() > 0
    assert temperature.grad != 0
    assert teacher.grad is None


def test_refusals(draw, pair):
    with pytest.raises(ValueError, match="logits of one shape"):
        ctkd_loss(draw(0, 6, 5), draw(1, 6, 4), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"temperature must be one number \(\) or one for each"):
        ctkd_loss(draw(0, 6, 5), draw(1, 6, 5), torch.ones(5))
    with pytest.raises(ValueError, match="form must be one of global, instance"):
        CTKD(form="batch")
    for key in ("lowest", "span"):
        with pytest.raises(ValueError, match=f"{key} must be positive and finite"):
            CTKD(**{key: 0.0})
    for value in (0, 2.5, True):
        with pytest.raises(ValueError, match="curriculum_steps must be a positive integer"):
            CTKD(curriculum_steps=value)
    with pytest.raises(RuntimeError, match=r"CTKD is not prepared.*Distiller\.prepare"):
        CTKD(form="instance")(*pair, None)
