"""Records of the original implementations, and inputs as the records define them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pcka.losses import numerics

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
    numerics._warn_once.cache_clear()


@pytest.fixture(scope="session")
def meets_numpy():
    """Assert that ``loss(student, teacher)`` has value and gradient of a NumPy rewriting, to 1e-9.

    The gradient is that of a complex step, ``Im f(s + i h e) / h``: exact to rounding for a
    rewriting without ``abs``, comparisons and the like.
    """

    def check(
        loss: Callable[[Tensor, Tensor], Tensor],
        rewriting: Callable[[np.ndarray, np.ndarray], complex],
        student: Tensor,
        teacher: Tensor,
    ) -> None:
        value = loss(student.requires_grad_(), teacher)
        (grad,) = torch.autograd.grad(value, student)
        s, t = student.detach().numpy(), teacher.numpy()
        expected = np.zeros_like(s)
        for place in np.ndindex(s.shape):
            moved = s.astype(complex)
            moved[place] += 1e-30j
            expected[place] = rewriting(moved, t).imag / 1e-30
        assert value.item() == pytest.approx(rewriting(s, t), rel=1e-9)
        np.testing.assert_allclose(
            grad.numpy(), expected, rtol=1e-9, atol=1e-9 * abs(expected).max()
        )

    return check
