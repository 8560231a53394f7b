"""The operators, as pcka calls them, against the oracle; skipped where they are not loaded."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import pcka
from pcka.ops import reference

needs_extension = pytest.mark.skipif(
    not pcka.build_info()["extension"], reason="the compiled operators are not loaded"
)
pytestmark = needs_extension

GROUPINGS = ["channel", "batch", "position"]
RELATIONS = ["rows", "columns"]
# (shape, patch): resized both ways, tails, one patch, one channel, one image, no resize.
MAPS = [
    ((2, 6, 33, 40), (16, 16)),
    ((3, 4, 9, 14), (2, 5)),
    ((1, 3, 32, 24), (8, 8)),
    ((3, 1, 5, 40), (16, 8)),
    ((2, 3, 7, 6), (8, 8)),
]


def tolerance(dtype: torch.dtype) -> float:
    """Against the reference, which computes in float32: bfloat16 maps go through bfloat16 Grams."""
    exact = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2}
    return exact.get(dtype, 3e-2)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance, absolute where the reference is (nearly) zero."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / max(b.norm().item(), 1e-2)).item()


def value_and_grads(function, *inputs):
    """Result and gradients under random weights, so that groups cannot stand in for each other."""
    result = function(*inputs)
    weights = torch.linspace(0.5, 1.5, result.numel(), device=result.device, dtype=result.dtype)
    wanted = [x for x in inputs if x.requires_grad]
    return result, *torch.autograd.grad((result * weights.view_as(result)).sum(), wanted)


def assert_same(function, oracle, *inputs):
    for ours, theirs in zip(value_and_grads(function, *inputs), value_and_grads(oracle, *inputs)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert error(ours, theirs) < tolerance(inputs[0].dtype)


def make(*shape, dtype=torch.float64, device="cpu", grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x.to(device=device, dtype=dtype).requires_grad_(grad)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(("shape", "patch"), MAPS, ids=str)
def test_patch_cka_equals_the_reference(device, dtype, shape, patch):
    student = make(*shape, dtype=dtype, device=device, grad=True)
    teacher = make(*shape, dtype=dtype, device=device, seed=1)
    for group_by, relation, center in itertools.product(GROUPINGS, RELATIONS, [True, False]):
        options = {
            "patch_size": patch, "group_by": group_by, "relation": relation, "center": center,
        }  # fmt: skip
        assert_same(
            lambda s, t, options=options: pcka.patch_cka(s, t, **options),
            lambda s, t, options=options: reference.patch_cka(s, t, **options),
            student,
            teacher,
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("n", "d_x", "d_y"), [(16, 20, 33), (40, 5, 7), (4, 1, 1), (9, 64, 3)])
def test_cka_equals_the_reference_and_differentiates_both(device, dtype, center, n, d_x, d_y):
    x = make(3, n, d_x, dtype=dtype, device=device, grad=True)
    y = make(3, n, d_y, dtype=dtype, device=device, grad=True, seed=1)
    assert_same(
        lambda x, y: pcka.cka(x, y, center=center),
        lambda x, y: reference.cka(x, y, center=center),
        x,
        y,
    )
    assert_same(
        lambda x, y: pcka.cka(x[0], y[0], center=center),
        lambda x, y: reference.cka(x[0], y[0], center=center),
        x,
        y,
    )


@pytest.mark.parametrize("group_by", GROUPINGS)
@pytest.mark.parametrize("center", [True, False])
def test_patch_gram_equals_the_reference(device, group_by, center):
    """Its gradient goes through the un-centering adjoint, with an arbitrary upstream gradient."""
    x = make(2, 3, 9, 14, device=device, grad=True)
    options = {"patch_size": (4, 5), "group_by": group_by, "center": center}
    assert_same(
        lambda x: pcka.patch_gram(x, **options), lambda x: reference.patch_gram(x, **options), x
    )


@pytest.mark.parametrize("group_by", GROUPINGS)
def test_memory_layout_does_not_matter(device, group_by):
    student, teacher = make(2, 6, 18, 20, device=device), make(2, 6, 18, 20, device=device, seed=1)
    options = {"patch_size": 8, "group_by": group_by}
    expected = value_and_grads(
        lambda s, t: pcka.patch_cka(s, t, **options), student.requires_grad_(), teacher
    )
    layouts = [
        student.detach().contiguous(memory_format=torch.channels_last),
        student.detach().transpose(2, 3).contiguous().transpose(2, 3),
        student.detach().repeat_interleave(2, dim=1)[:, ::2],
    ]
    for layout in layouts:
        assert layout.stride() != student.stride()
        got = value_and_grads(
            lambda s, t: pcka.patch_cka(s, t, **options), layout.requires_grad_(), teacher
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_cka_reads_strided_samples():
    x, y = make(10, 24), make(24, 10, seed=1).t()
    assert torch.equal(pcka.cka(x, y), pcka.cka(x, y.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("relation", RELATIONS)
def test_constant_groups_align_with_nothing(device, dtype, relation):
    """Features that are constant up to rounding: alignment 0 and gradient 0, never NaN."""
    student = make(2, 3, 20, 30, dtype=dtype, device=device)
    teacher = make(2, 3, 20, 30, dtype=dtype, device=device, seed=1)
    student[:, 1], teacher[:, 2] = 0.1, -1234.5
    options = {"patch_size": 4, "relation": relation}
    alignment, grad = value_and_grads(
        lambda s, t: pcka.patch_cka(s, t, **options), student.requires_grad_(), teacher
    )
    assert alignment[0] > 0 and (alignment[1:] == 0).all()
    assert grad[:, 0].abs().max() > 0 and (grad[:, 1:] == 0).all()
    uncentered = pcka.patch_cka(student, teacher, center=False, **options)
    assert (uncentered > 0).all()  # a constant is not degenerate there, only zero is
    assert pcka.patch_cka(torch.zeros_like(teacher), teacher, center=False).eq(0).all()


def test_scale_does_not_matter_even_where_grams_would_overflow(device):
    x, y = (make(16, 32, dtype=torch.float32, device=device, seed=s) for s in (0, 1))
    expected = pcka.cka(x, y)
    for scale in (1e-8, 1e12):
        assert torch.allclose(pcka.cka(x * scale, y), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float64, 1e150),
        (torch.float64, 1e-150),
        (torch.bfloat16, 1e20),
        (torch.bfloat16, 1e-20),
    ],
    ids=str,
)
def test_value_and_scaled_gradient_are_those_of_scale_one(device, dtype, scale):
    """To the last bit, as powers of two round nothing; in the operators and in the reference."""
    scale = 2.0 ** round(math.log2(scale))
    student = make(2, 6, 18, 20, dtype=dtype, device=device, grad=True)
    teacher = make(2, 6, 18, 20, dtype=dtype, device=device, seed=1)
    for module, group_by, relation in itertools.product((pcka, reference), GROUPINGS, RELATIONS):
        options = {
            "patch_size": (8, 8), "group_by": group_by, "relation": relation, "center": True,
        }  # fmt: skip
        assert_scale_free(
            lambda s, t, m=module, o=options: m.patch_cka(s, t, **o), student, teacher, scale
        )
    x, y = student.detach().view(12, -1), teacher.view(12, -1)
    for module, center, shape in itertools.product(
        (pcka, reference), (True, False), ((12, 360), (360, 12))
    ):
        samples = x.view(shape).requires_grad_()
        assert_scale_free(
            lambda s, t, m=module, c=center: m.cka(s, t, center=c), samples, y.view(shape), scale
        )


def assert_scale_free(function, x, y, scale):
    expected, grad = value_and_grads(function, x, y)
    large = (x.detach() * scale).requires_grad_()
    got, scaled = value_and_grads(function, large, y / scale)
    assert expected.abs().max() > 0
    assert torch.allclose(got, expected, rtol=4 * torch.finfo(expected.dtype).eps, atol=0)
    assert error(scaled * scale / grad.abs().max(), grad / grad.abs().max()) < 1e-6


def test_groups_of_very_different_scales_align_alike():
    """Each group is scaled by itself: of float32, over 60 powers of ten."""
    student, teacher = (make(2, 3, 16, 16, dtype=torch.float32, seed=s) for s in (0, 1))
    scales = torch.tensor([2.0**-100, 1, 2.0**100]).view(1, 3, 1, 1)
    for module in (pcka, reference):
        options = {"patch_size": (4, 4), "group_by": "channel", "relation": "rows", "center": True}
        expected = module.patch_cka(student, teacher, **options)
        got = module.patch_cka(student * scales, teacher * scales, **options)
        assert torch.allclose(got, expected, rtol=1e-6)


def test_not_a_number_is_passed_on():
    x, y = make(8, 4, dtype=torch.float32), make(8, 4, dtype=torch.float32, seed=1)
    x[3, 2] = torch.nan
    assert pcka.cka(x, y).isnan()
    x[3, 2] = torch.inf
    assert pcka.cka(x, y).isnan()


def test_a_far_mean_costs_no_more_than_in_eager():
    """Centering's hard case, at most twice the error of the eager version in the same dtype."""
    exact_s, exact_t = make(2, 8, 32, 48) + 100, make(2, 8, 32, 48, seed=1) - 300
    exact_s, exact_t = exact_s.float().double(), exact_t.float().double()
    options = {"patch_size": (8, 8), "group_by": "channel", "relation": "rows", "center": True}
    truth = value_and_grads(
        lambda s, t: reference.patch_cka(s, t, **options), exact_s.requires_grad_(), exact_t
    )
    student, teacher = exact_s.detach().float().requires_grad_(), exact_t.float()
    ours = value_and_grads(lambda s, t: pcka.patch_cka(s, t, **options), student, teacher)
    eager = value_and_grads(lambda s, t: reference.patch_cka(s, t, **options), student, teacher)
    for a, b, exact in zip(ours, eager, truth):
        assert error(a, exact) <= 2 * error(b, exact) + 1e-7


def test_gradcheck(device):
    student = make(2, 2, 7, 9, device=device, grad=True)
    teacher = make(2, 2, 7, 9, device=device, seed=1)
    for group_by, relation in itertools.product(GROUPINGS, RELATIONS):
        assert torch.autograd.gradcheck(
            lambda s, g=group_by, r=relation: pcka.patch_cka(
                s, teacher, patch_size=(3, 4), group_by=g, relation=r
            ),
            student,
        )
    x, y = make(2, 5, 8, device=device, grad=True), make(2, 5, 2, device=device, grad=True, seed=1)
    assert torch.autograd.gradcheck(pcka.cka, (x, y))
    assert torch.autograd.gradcheck(
        lambda x: pcka.patch_gram(x, patch_size=(3, 4)), make(1, 2, 7, 9, grad=True, device=device)
    )


def test_float16_gradients_survive_until_the_loss_is_scaled():
    """They are formed before the loss is scaled, and would be 0 or coarse in float16 by then."""
    x, y = (make(64, 1024, dtype=torch.float16, seed=seed) for seed in (0, 1))
    student, teacher = (t.view(64, 4, 16, 16) for t in (x, y))
    for ours, exact, inputs in (
        (pcka.cka, reference.cka, (x, y)),
        (lambda s, t: pcka.patch_cka(s, t, patch_size=4).mean(),) * 2 + ((student, teacher),),
    ):
        s = inputs[0].requires_grad_()
        (scaled,) = torch.autograd.grad(ours(s, inputs[1]) * 2.0**15, s)
        wide = s.detach().double().requires_grad_()
        (truth,) = torch.autograd.grad(exact(wide, inputs[1].double()) * 2.0**15, wide)
        assert scaled.dtype == torch.float16
        assert error(scaled, truth) < 1e-3


def test_autocast_does_not_reach_inside(device):
    """Under autocast a plain bmm would round to bfloat16 and lose two digits."""
    student = make(2, 4, 32, 32, dtype=torch.float32, device=device, grad=True)
    teacher = make(2, 4, 32, 32, dtype=torch.float32, device=device, seed=1)
    x, y = student.flatten(1), teacher.flatten(1)
    for function, inputs in [
        (lambda s, t: pcka.patch_cka(s, t, patch_size=8), (student, teacher)),
        (lambda s, t: pcka.patch_cka(s, t, patch_size=8, relation="columns"), (student, teacher)),
        (lambda s, t: pcka.patch_gram(s, patch_size=8), (student, teacher)),
        (lambda s, t: pcka.cka(s, t, row_normalize=True), (x, y)),
        (pcka.cka, (x, y)),
    ]:
        plain = function(*inputs)
        with torch.autocast(device, dtype=torch.bfloat16):
            assert torch.equal(function(*inputs), plain)
