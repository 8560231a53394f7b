from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from pcka.losses import VKD, Outputs, vkd_loss


def numpy_vkd(student, teacher) -> complex:
    """Entry by entry; the branch of the distance by the real part, as a complex step needs it."""
    total = 0.0
    for s, t in zip(student, teacher):
        t = (t - t.mean()) / np.sqrt(((t - t.mean()) ** 2).mean() + 1e-5)
        for x in s - t:
            size = x if x.real > 0 else -x
            total += x**2 / 2 if size.real < 1 else size - 0.5
    return total / student.size


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_value_and_gradient_from_the_definition(draw, meets_numpy, scale):
    meets_numpy(vkd_loss, numpy_vkd, draw(0, 6, 5, scale=scale), draw(1, 6, 5, scale=2))


def test_shift_and_scale_of_the_teachers_sample_are_free(draw):
    student, teacher = draw(0, 6, 5), draw(1, 6, 5)
    moved = 1000 * teacher + 30
    torch.testing.assert_close(
        vkd_loss(student, moved), vkd_loss(student, 1000 * teacher), rtol=1e-9, atol=0
    )


def test_gradient_reaches_only_the_student(draw):
    student, teacher = draw(0, 6, 5).requires_grad_(), draw(1, 6, 5).requires_grad_()
    vkd_loss(student, teacher).backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None


SHAPES = {
    "convolutional": ((6, 3, 4, 4), (6, 5, 2, 2)),
    "pooled": ((6, 3), (6, 5)),
    "map and vector": ((6, 3, 4, 4), (6, 5)),
    "wider student": ((6, 7, 4, 4), (6, 5, 2, 2)),
    "equal widths": ((6, 5), (6, 5)),
}


def outputs(draw, shapes, dtype=torch.float64):
    own, other = (draw(i, *shape).to(dtype) for i, shape in enumerate(shapes))
    return Outputs(features={"last": own}), Outputs(features={"last": other})


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=list(SHAPES))
def test_projection_of_the_means_over_positions(draw, shapes):
    student, teacher = outputs(draw, shapes)
    loss = VKD(weights=[3.0])
    loss.prepare(student, teacher)
    own, other = (x.features["last"] for x in (student, teacher))
    own, other = (x.mean((2, 3)) if x.dim() == 4 else x for x in (own, other))
    projection = loss.projections["last"].weight.detach()
    assert projection.shape == (other.shape[1], own.shape[1])
    expected = {"loss_vkd_last": 3 * vkd_loss(own @ projection.T, other)}
    torch.testing.assert_close(loss(student, teacher, None), expected)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_is_orthonormal_after_training_with_weight_decay_under_autocast(
    draw, shapes, dtype
):
    torch.manual_seed(0)
    student, teacher = outputs(draw, shapes, dtype)
    loss = VKD()
    loss.prepare(student, teacher)
    before = loss.projections["last"].weight.detach().clone()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    history = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(student, teacher, None)["loss_vkd_last"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(value.item())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss(student, teacher, None)
    torch.testing.assert_close(rounded, loss(student, teacher, None), rtol=1e-6, atol=0)
    weight = loss.projections["last"].weight.detach()
    assert (weight - before).abs().max() > 0.05
    assert history[-1] < history[0]
    weight = weight if len(weight) > weight.shape[1] else weight.T  # columns, or rows
    eye = torch.eye(weight.shape[1])
    torch.testing.assert_close(weight.T @ weight, eye, rtol=0, atol=1e-5)


def test_resuming_restores_the_projection_bit_for_bit(draw):
    student, teacher = outputs(draw, SHAPES["convolutional"], torch.float32)
    loss, resumed = VKD(), VKD()
    loss.prepare(student, teacher)
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter)
    resumed.prepare(student, teacher)  # another random start
    resumed.load_state_dict(copy.deepcopy(loss.state_dict()))
    weights = [x.projections["last"].weight for x in (loss, resumed)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_refusals(draw):
    with pytest.raises(ValueError, match=r"pooled features of one shape \(B, D\)"):
        vkd_loss(draw(0, 6, 5), draw(1, 6, 4))
    tokens = Outputs(features={"last": draw(0, 6, 4, 5)})
    with pytest.raises(ValueError, match=r"must be pooled \(B, D\) or maps.*:map"):
        VKD().prepare(tokens, tokens)
    with pytest.raises(ValueError, match="teacher: VKD needs it"):
        VKD().prepare(Outputs(features={"last": draw(0, 6, 5)}), None)
    pair = outputs(draw, SHAPES["pooled"])
    with pytest.raises(RuntimeError, match=r"VKD is not prepared"):
        VKD()(*pair, None)
