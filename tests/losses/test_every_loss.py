"""What holds for every registered loss."""

from __future__ import annotations

import pytest
import torch

from pcka import losses
from pcka.losses import Outputs

SAMPLES, CLASSES = 8, 5
STAGES = ("stage1", "stage2", "stage3")
SHAPES = dict.fromkeys(STAGES, (SAMPLES, 4, 16, 16)) | {"pooled": (SAMPLES, 6)}


def _outputs(draw, seed, dtype=torch.float64, scale=1.0):
    features = {
        name: draw(seed + i, *shape, scale=scale).to(dtype)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return Outputs(draw(seed + 9, SAMPLES, CLASSES, scale=scale).to(dtype), features)


def _build(name):
    """The loss with its defaults; a patch that leaves several to PCKA."""
    return losses.build(name, **({"patch_sizes": (4,)} if name == "PCKA" else {}))


def _leaves(outputs):
    return [outputs.logits, *outputs.features.values()]


TARGET = torch.arange(SAMPLES) % CLASSES


@pytest.mark.parametrize("name", losses.names())
def test_gradient_reaches_what_the_loss_reads_of_the_student_alone(draw, name):
    student, teacher = _outputs(draw, 0), _outputs(draw, 20)
    for leaf in _leaves(student):
        leaf.requires_grad_()
    loss = _build(name)
    terms = loss(student, teacher, TARGET)
    sum(terms.values()).backward()
    for stage in loss.taps:
        assert student.features[stage].grad.norm() > 0
    if loss.needs_logits or name == "CE":
        assert student.logits.grad.norm() > 0
    assert all(leaf.grad is None for leaf in _leaves(teacher))


@pytest.mark.parametrize("name", losses.names())
def test_loss_falls_on_one_batch(draw, name):
    student, teacher = _outputs(draw, 0), _outputs(draw, 20)
    leaves = [leaf.requires_grad_() for leaf in _leaves(student)]
    loss = _build(name)
    optimizer = torch.optim.Adam(leaves, lr=0.02)
    history = []
    for _ in range(40):
        total = sum(loss(student, teacher, TARGET).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    # Cross-entropies do not end at 0; each falls by a tenth of its start at the very least.
    assert history[-1] < 0.9 * history[0]


@pytest.mark.parametrize("name", losses.names())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_precision_outputs_stay_finite_and_exact(draw, name, dtype):
    student, teacher = (_outputs(draw, seed, dtype, scale=30) for seed in (0, 20))
    exact = [
        Outputs(o.logits.double(), {k: v.double() for k, v in o.features.items()})
        for o in (student, teacher)
    ]
    loss = _build(name)
    for term, value in loss(student, teacher, TARGET).items():
        assert value.dtype == torch.float32
        expected = loss(*exact, TARGET)[term]
        torch.testing.assert_close(value.double(), expected, rtol=2e-3, atol=1e-3 * expected.item())
