from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pcka.losses import KDSVD, Outputs, kdsvd_loss

SHAPES = ((3, 4, 6, 5), (3, 5, 4, 4), (3, 30, 3, 3))  # the last has fewer positions than channels


def numpy_vectors(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Singular values and right vectors ``(C, k)`` of one sample's map."""
    _, values, rows = np.linalg.svd(x.reshape(len(x), -1).T, full_matrices=False)
    lacking = max(0, k - len(values))
    return np.pad(values[:k], (0, lacking)), np.pad(rows[:k].T, ((0, 0), (0, lacking)))


def numpy_kdsvd(students: list[np.ndarray], teachers: list[np.ndarray], k: int) -> float:
    total = 0.0
    for sample in range(len(students[0])):
        vectors = []
        for student, teacher in zip(students, teachers):
            values, v_t = numpy_vectors(teacher[sample], k)
            _, candidates = numpy_vectors(student[sample], k + 3)
            v_t = v_t * np.where(v_t.sum(0) < 0, -1, 1)
            v_s = np.empty_like(v_t)
            for j in range(k):
                cosines = candidates.T @ v_t[:, j]
                best = np.abs(cosines).argmax()
                v_s[:, j] = np.sign(cosines[best]) * candidates[:, best]
            scale = values / np.linalg.norm(values)
            vectors.append((v_s * scale, v_t * scale))
        for before, after in itertools.pairwise(vectors):
            r_s, r_t = (np.exp(-((v[:, None] - u[None]) ** 2) / 8) for u, v in zip(before, after))
            total += ((r_s - r_t) ** 2).sum()
    return total / len(students[0])


@pytest.fixture
def maps(draw):
    students = [draw(i, *shape) for i, shape in enumerate(SHAPES)]
    teachers = [draw(10 + i, *shape) for i, shape in enumerate(SHAPES)]
    return students, teachers


@pytest.mark.parametrize("k", [1, 3, 7, 100])  # the first stage has 4 vectors, the second 5
def test_loss_from_the_definition(maps, k):
    expected = numpy_kdsvd(*([x.numpy() for x in model] for model in maps), k)
    assert kdsvd_loss(*maps, k=k).item() == pytest.approx(expected, rel=1e-9)


def test_positions_may_differ_and_their_order_does_not_count(draw, maps):
    students, teachers = maps
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    shuffled = teachers[0].flatten(2)[..., order].view(3, 4, 10, 3)
    moved = kdsvd_loss(students, [shuffled, *teachers[1:]])
    torch.testing.assert_close(moved, kdsvd_loss(students, teachers))


def test_scale_and_sign_of_the_student_do_not_count(maps):
    students, teachers = maps
    scaled = [-3 * students[0], 1e-3 * students[1], students[2]]
    torch.testing.assert_close(kdsvd_loss(scaled, teachers), kdsvd_loss(students, teachers))
    assert kdsvd_loss(teachers, teachers).item() == pytest.approx(0, abs=1e-20)


def with_spectrum(draw, shape, values):
    """Maps whose singular values are ``values``."""
    b, c, h, w = shape
    left, right = (torch.linalg.qr(draw(s, b, n, 4)).Q for s, n in ((1, h * w), (2, c)))
    return (left * torch.tensor(values).double() @ right.mT).mT.reshape(shape)


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 12, 3, 3)])
def test_gradient_is_that_of_the_singular_vectors_where_they_are_apart(draw, shape):
    student = with_spectrum(draw, shape, [3.0, 2.0, 1.0, 0.5]).requires_grad_()
    fixed, teachers = draw(3, *shape), [draw(4, *shape), draw(5, *shape)]
    (grad,) = torch.autograd.grad(kdsvd_loss([student, fixed], teachers), student)

    def nearest(x, v_t, k):
        _, _, rows = torch.linalg.svd(x.flatten(2).mT, full_matrices=False)
        cosines = (rows[:, :k] @ v_t[..., None])[..., 0]
        best = cosines.abs().argmax(1)
        picked = torch.arange(len(x)), best
        return rows[picked] * cosines[picked].sign()[:, None]

    rows = [torch.linalg.svd(t.flatten(2).mT, full_matrices=False)[2][:, 0] for t in teachers]
    v_t = [torch.where(v.sum(1, keepdim=True) < 0, -v, v) for v in rows]
    v_s = [nearest(x, v, 4) for x, v in zip((student, fixed), v_t)]
    r_s, r_t = ((-(v[1][:, :, None] - v[0][:, None]).square() / 8).exp() for v in (v_s, v_t))
    (expected,) = torch.autograd.grad((r_s - r_t).square().sum() / 2, student)
    assert expected.norm() > 0
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 12, 3, 3)])
@pytest.mark.parametrize(
    "values",
    [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1e-4, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
)
def test_ties_and_zeros_give_a_bounded_gradient(draw, values, shape, dtype):
    student = with_spectrum(draw, shape, values).to(dtype).requires_grad_()
    fixed, teachers = draw(3, *shape), [draw(4, *shape), draw(5, *shape)]
    fixed, teachers = fixed.to(dtype), [t.to(dtype) for t in teachers]
    loss = kdsvd_loss([student, fixed], teachers)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.norm() < 100
    if not any(values):
        assert student.grad.count_nonzero() == 0


def test_autocast_rounds_nothing(maps):
    students, teachers = ([x.float() for x in model] for model in maps)
    with torch.autocast("cpu", torch.bfloat16):
        inside = kdsvd_loss(students, teachers)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, kdsvd_loss(students, teachers), rtol=0, atol=0)


def test_gradient_reaches_no_teacher(maps):
    students, teachers = ([x.requires_grad_() for x in model] for model in maps)
    kdsvd_loss(students, teachers).backward()
    assert all(x.grad.norm() > 0 for x in students)
    assert all(x.grad is None for x in teachers)


def test_module_adapts_only_the_width_that_differs(draw):
    student = Outputs(features={"a": draw(0, 3, 4, 4, 4), "b": draw(1, 3, 5, 4, 4)})
    teacher = Outputs(features={"a": draw(2, 3, 4, 4, 4), "b": draw(3, 3, 8, 2, 2)})
    loss = KDSVD(stages=("a", "b"), weight=3.0)
    with pytest.raises(ValueError, match=r"of the same C.*Distiller\.prepare"):
        loss(student, teacher, None)
    loss.prepare(student, teacher)
    (kernel,) = loss.parameters()
    terms = loss(student, teacher, None)
    assert list(terms) == ["loss_kdsvd"]
    widened = F.conv2d(student.feature("b"), kernel)
    maps = [student.feature("a"), widened], list(teacher.features.values())
    torch.testing.assert_close(terms["loss_kdsvd"], 3 * kdsvd_loss(*maps))


def test_refusals(draw):
    x = draw(0, 3, 4, 4, 4)
    with pytest.raises(ValueError, match=r"same two or more stages; got 1 and 1"):
        kdsvd_loss([x], [x])
    with pytest.raises(ValueError, match=r"feature maps \(B, C, H, W\) of the same C"):
        kdsvd_loss([x, x], [x, draw(0, 3, 4)])
    with pytest.raises(ValueError, match="the same samples"):
        kdsvd_loss([x, x], [x, x[:2]])
    with pytest.raises(ValueError, match="once"):
        KDSVD(stages=("a", "a"))
    with pytest.raises(ValueError, match=r"stages must name two or more, .*; got \['a'\]"):
        KDSVD(stages=("a",))
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
        KDSVD(k=0)
