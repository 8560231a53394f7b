from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from pcka.engine.model_cost import latencies, model_size


def test_a_convolutions_multiplications_and_bytes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).train()
    size = model_size(model, torch.zeros(1, 3, 10, 12))
    assert size.parameters == 8 * 3 * 9 + 8 + 2 * 8
    assert size.state_bytes == 4 * (size.parameters + 2 * 8) + 8  # statistics, and their counter
    assert size.macs is not None and size.uncounted == ()
    # A norm's few per cent beside, as fvcore counts them.
    assert 1.0 <= size.macs / (8 * 3 * 9 * 10 * 12) < 1.1
    assert model[1].training and model[1].num_batches_tracked == 0


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_an_attention_that_is_not_counted_is_named():
    size = model_size(Attention(), torch.zeros(1, 2, 4, 8))
    assert size.parameters == 0
    assert size.uncounted == ("scaled_dot_product_attention",)


class Unruly(nn.Module):
    def forward(self, x):
        raise RuntimeError("no tracing")


def test_a_model_that_cannot_be_traced_has_no_count(caplog):
    assert model_size(Unruly(), torch.zeros(1)).macs is None
    assert "MACs are not counted: no tracing" in caplog.text


def test_slow_calls_are_timed_less_often(monkeypatch):
    counts = {"one": 0, "two": 0}

    def call(name):
        counts[name] += 1

    calls = {name: lambda name=name: call(name) for name in counts}
    found = latencies(calls, torch.device("cpu"))
    assert found.keys() == counts.keys() and all(value >= 0 for value in found.values())
    many = dict(counts)
    monkeypatch.setattr("pcka.engine.model_cost.SECONDS", 0.0)
    latencies(calls, torch.device("cpu"))
    assert all(0 < counts[name] - many[name] < many[name] for name in counts)
