from __future__ import annotations

import torch
from torch import nn

from classification.average import AveragedStudent
from pcka.taps import Observer


class Tied(nn.Module):
    """A weight of two names, a batch norm, a buffer that no state has."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)

    def forward(self, x):
        return self.norm(self.second(self.first(x)))


def test_the_average_is_a_lerp_by_hand():
    torch.manual_seed(0)
    student = Tied()
    average = AveragedStudent(student)
    expected = {name: value.clone() for name, value in student.state_dict().items()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for decay in (0.0, 0.5, 0.9, 0.9):
        student(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        average.set_decay(decay)
        average.update()
        for name, value in student.state_dict().items():
            if name == "norm.num_batches_tracked":
                expected[name] = value.clone()
            else:
                expected[name] = decay * expected[name] + (1 - decay) * value
    state = average.model.state_dict()
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-6)
    assert state["norm.num_batches_tracked"] == 4
    assert not torch.allclose(state["norm.running_mean"], student.norm.running_mean)
    assert average.model.first.weight is average.model.second.weight
    assert average.model.mask.tolist() == [0.0, -torch.inf]
    assert not any(p.requires_grad for p in average.model.parameters())


def test_all_that_an_update_changes_is_named():
    student = Tied()
    average = AveragedStudent(student)
    named = {tensor.data_ptr() for tensor in average.tensors()}
    assert named == {value.data_ptr() for value in average.model.state_dict().values()}
    assert named.isdisjoint(value.data_ptr() for value in student.state_dict().values())


def test_a_student_that_is_observed_compiled_is_copied_apart():
    """Such taps stay on the model; those of the copy keep nothing."""
    student = Tied()
    observer = Observer(student, {"first": "first"}, compile=True)
    average = AveragedStudent(student)
    observer._watching = True  # as while the student runs
    average.model.eval()(torch.ones(2, 3))
    assert observer._features == {}
    student(torch.ones(2, 3))
    assert observer._features.keys() == {"first"}
