"""Records of the original implementations, and inputs as the records define them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pcka.losses import degenerate

RECORDS = Path(__file__).parents[1] / "fixtures" / "losses.json"
Draw = Callable[..., Tensor]


@pytest.fixture(scope="session")
def draw() -> Draw:
    """``draw(seed, *shape, scale=1.0)``: normal numbers in float64, the same everywhere."""

    def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.from_numpy(np.random.RandomState(seed).randn(*shape) * scale)

    return draw


@pytest.fixture(scope="session")
def records() -> dict[str, dict]:
    return {record["name"]: record for record in json.loads(RECORDS.read_text())}


@pytest.fixture
def meets_record(draw, records):
    """Assert that ``loss(student, teacher[, target])`` has a record's figures, to 1e-9."""

    def check(name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        record = records[name]
        student, teacher = (
            draw(record[side]["seed"], *record[side]["shape"], scale=record["scale"])
            for side in ("student", "teacher")
        )
        target = [torch.tensor(record["target"])] if "target" in record else []
        value = loss(student.requires_grad_(), teacher, *target)
        (grad,) = torch.autograd.grad(value, student)
        norm = record["grad_norm"]
        assert value.item() == pytest.approx(record["loss"], rel=1e-9)
        assert grad.norm().item() == pytest.approx(norm, rel=1e-9)
        first = grad.flatten()[:5].tolist()
        assert first == pytest.approx(record["grad_first5"], rel=1e-9, abs=1e-9 * norm)

    return check


@pytest.fixture(autouse=True)
def forget_warnings():
    """Degenerate levels warn once a process; each test starts anew."""
    degenerate._warn_once.cache_clear()
