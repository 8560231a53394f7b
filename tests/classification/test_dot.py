from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from classification.config import CONFIGS, load_config
from classification.dot import DistillationOriented
from classification.run import run_experiment
from pcka.engine.config import ConfigError
from pcka.files import load_file

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


class Numpy:
    """One parameter, step by step: the velocities of Zhao et al. 2023."""

    def __init__(self, p, lr, momentum, weight_decay, delta):
        self.p, self.task, self.taught = p.copy(), np.zeros_like(p), np.zeros_like(p)
        self.lr, self.decay = lr, weight_decay
        self.momenta = momentum - delta, momentum + delta

    def step(self, g_task, g_taught):
        self.task = self.momenta[0] * self.task + g_task + self.decay * self.p
        self.taught = self.momenta[1] * self.taught + g_taught
        self.p = self.p - self.lr * (self.task + self.taught)


@pytest.fixture
def parts():
    """A student, an adapter, and what the terms of a step are made of."""
    torch.manual_seed(0)
    return nn.Linear(3, 2).double(), nn.Linear(2, 2).double(), torch.randn(8, 4, 3).double()


def terms(student, adapter, x):
    """The task's, which the adapter has no part in, and the teacher's."""
    out = student(x)
    return [out.square().mean(), out.sum() / 9], [adapter(out).sin().mean()]


def test_steps_are_those_of_the_definition(parts):
    student, adapter, inputs = parts
    optimizer = DistillationOriented(
        [*student.parameters(), *adapter.parameters()], delta=0.075, **SETTINGS
    )
    other = [Numpy(p.detach().numpy(), **SETTINGS, delta=0.075) for p in student.parameters()]
    for x in inputs:
        task, taught = (
            torch.autograd.grad(sum(part), list(student.parameters()))
            for part in (terms(student, adapter, x)[side] for side in (0, 1))
        )
        for ours, g_task, g_taught in zip(other, task, taught):
            ours.step(g_task.numpy(), g_taught.numpy())
        optimizer.zero_grad()
        optimizer.backward(*terms(student, adapter, x))
        optimizer.step()
        for ours, parameter in zip(other, student.parameters()):
            np.testing.assert_allclose(parameter.detach().numpy(), ours.p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kept", ["task", "taught", "both"])
def test_one_gradient_alone_has_sgds_momentum_and_so_has_no_difference(parts, kept):
    """Where only the task or only the teacher reaches a parameter, and where ``delta`` is 0."""
    student, adapter, inputs = parts
    ours = [student, adapter]
    plain = copy.deepcopy(ours)
    delta = 0.0 if kept == "both" else 0.075
    optimizers = [
        DistillationOriented(nn.ModuleList(ours).parameters(), delta=delta, **SETTINGS),
        torch.optim.SGD(nn.ModuleList(plain).parameters(), **SETTINGS),
    ]
    for x in inputs:
        task, taught = terms(*ours, x)
        task, taught = ([] if kept == "taught" else task), ([] if kept == "task" else taught)
        optimizers[0].zero_grad()
        optimizers[0].backward(task, taught)
        task, taught = terms(*plain, x)
        loss = sum([] if kept == "taught" else task) + sum([] if kept == "task" else taught)
        optimizers[1].zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    for own, other in zip(nn.ModuleList(ours).parameters(), nn.ModuleList(plain).parameters()):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


def test_adapters_have_sgds_momentum_beside_a_student_with_two(parts):
    student, adapter, inputs = parts
    optimizer = DistillationOriented(
        [*student.parameters(), *adapter.parameters()], delta=0.075, **SETTINGS
    )
    expected = [p.detach().clone().requires_grad_() for p in adapter.parameters()]
    sgd = torch.optim.SGD(expected, **SETTINGS)
    for x in inputs:
        gradients = torch.autograd.grad(
            terms(student, adapter, x)[1][0], list(adapter.parameters())
        )
        for parameter, gradient in zip(expected, gradients):
            parameter.grad = gradient
        sgd.step()
        optimizer.zero_grad()
        optimizer.backward(*terms(student, adapter, x))
        optimizer.step()
    torch.testing.assert_close([*adapter.parameters()], expected, rtol=1e-9, atol=1e-12)


def test_a_frozen_parameter_stays(parts):
    student, adapter, inputs = parts
    student.bias.requires_grad_(False)
    before = student.bias.clone()
    optimizer = DistillationOriented(student.parameters(), delta=0.075, **SETTINGS)
    optimizer.backward(*terms(student, adapter, inputs[0]))
    optimizer.step()
    torch.testing.assert_close(student.bias, before, rtol=0, atol=0)


@pytest.mark.parametrize(("delta", "momentum"), [(-0.1, 0.9), (0.5, 0.4), (0.1, 0.9)])
def test_momenta_outside_0_and_1_are_refused(parts, delta, momentum):
    with pytest.raises(ValueError, match="delta: expected 0 to the momentum, and a sum of both"):
        DistillationOriented(parts[0].parameters(), lr=0.1, momentum=momentum, delta=delta)
    if delta > 0:
        words = ["DISTILL.DOT_DELTA", str(delta), "SOLVER.MOMENTUM", str(momentum)]
        with pytest.raises(ConfigError, match=r"DOT_DELTA: expected at most SOLVER\.MOMENTUM"):
            load_config(CONFIGS / "digits" / "resnet20_resnet8.yaml", words)


@pytest.mark.parametrize(
    ("key", "value", "fitting"),
    [
        ("NESTEROV", "True", "False"),
        ("OPTIMIZER", "adamw", "sgd"),
        ("ACCUMULATE", "2", "1"),
        ("CLIP_GRADIENTS", "1.0", "0.0"),
    ],
)
def test_what_has_no_form_with_two_momenta_is_refused(key, value, fitting):
    words = ["DISTILL.DOT_DELTA", "0.05", f"SOLVER.{key}", value]
    with pytest.raises(ConfigError, match=rf"plain SGD; set SOLVER\.{key} {fitting}, got {value}"):
        load_config(CONFIGS / "digits" / "resnet20_resnet8.yaml", words)


def test_a_run_parts_its_terms_by_who_teaches_them(pair_config, monkeypatch, tmp_path):
    seen = []
    backward = DistillationOriented.backward

    def watched(self, task, taught):
        seen.append((len(task), len(taught)))
        backward(self, task, taught)

    monkeypatch.setattr(DistillationOriented, "backward", watched)
    run_experiment(pair_config("rcka", "dot", **{"DISTILL.DOT_DELTA": 0.075}))
    assert set(seen) == {(1, 3)}  # cross-entropy; features, samples and classes
    state = load_file(tmp_path / "dot" / "checkpoint.pth")["optimizer"]["state"]
    assert all(velocity.keys() == {"task", "taught"} for velocity in state.values())
    assert any(velocity["taught"].abs().max() > 0 for velocity in state.values())
