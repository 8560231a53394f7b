"""The compiled operators against the oracle; skipped where they are not loaded."""

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

CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        not (torch.cuda.is_available() and pcka.build_info()["cuda_loaded"]),
        reason="no GPU, or no CUDA operators",
    ),
)
DEVICES = ["cpu", CUDA]
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


@pytest.mark.parametrize("device", DEVICES)
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


@pytest.mark.parametrize("device", DEVICES)
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_by", GROUPINGS)
@pytest.mark.parametrize("center", [True, False])
def test_patch_gram_equals_the_reference(device, group_by, center):
    """Its gradient goes through the un-centering adjoint, with an arbitrary upstream gradient."""
    x = make(2, 3, 9, 14, device=device, grad=True)
    options = {"patch_size": (4, 5), "group_by": group_by, "center": center}
    assert_same(
        lambda x: pcka.patch_gram(x, **options), lambda x: reference.patch_gram(x, **options), x
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_by", range(3))
def test_patchify_backward_is_the_adjoint(device, group_by):
    """<P x, g> = <x, P' g> for maps enlarged by little and by much."""
    for shape in [(2, 3, 9, 14), (1, 2, 1, 3), (1, 1, 17, 31)]:
        x = make(*shape, device=device)
        rows, energy = torch.ops.pcka.patchify(x, 4, 16, group_by, 0, x.dtype)
        g = torch.randn_like(rows)
        back = torch.full_like(x, torch.nan)
        torch.ops.pcka.patchify_backward_(back, g, 4, 16, group_by)
        assert torch.allclose((rows * g).sum(), (x * back).sum(), rtol=1e-11, atol=1e-11)
        assert torch.allclose(energy[:, 1], rows.square().sum((1, 2)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("center", range(3))
def test_rows_of_two_maps_stand_in_one_tensor_and_the_rows_that_are_none_of_theirs_are_zero(
    device, center
):
    maps = [make(2, 3, 9, 14, dtype=torch.bfloat16, device=device, seed=s) for s in (0, 1)]
    expected = [torch.ops.pcka.patchify(x, 4, 5, 0, center, torch.bfloat16) for x in maps]
    rows = torch.full((6, 16, 40), torch.nan, dtype=torch.bfloat16, device=device)
    energy = torch.full((6, 3), torch.nan, dtype=torch.float64, device=device)
    torch.ops.pcka.patchify_(rows, energy, *maps, 4, 5, 0, center, False)
    assert torch.equal(rows[:, :9], torch.cat([x for x, _ in expected]))
    assert rows[:, 9:].eq(0).all()
    assert torch.allclose(energy, torch.cat([e for _, e in expected]))


@pytest.mark.parametrize("device", DEVICES)
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


@pytest.mark.parametrize("device", DEVICES)
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


@pytest.mark.parametrize("device", DEVICES)
def test_scale_does_not_matter_even_where_grams_would_overflow(device):
    x, y = (make(16, 32, dtype=torch.float32, device=device, seed=s) for s in (0, 1))
    expected = pcka.cka(x, y)
    for scale in (1e-8, 1e12):
        assert torch.allclose(pcka.cka(x * scale, y), expected, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
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


@pytest.mark.parametrize("device", DEVICES)
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(device, grad):
    ops = torch.ops.pcka
    student = make(2, 3, 9, 14, dtype=torch.float32, device=device, grad=grad)
    teacher = make(2, 3, 9, 14, dtype=torch.float32, device=device, seed=1)
    for group_by, columns in itertools.product(range(3), [True, False]):
        torch.library.opcheck(
            ops.patch_cka.default, (student, teacher, 4, 5, group_by, columns, True, grad)
        )
        torch.library.opcheck(
            ops.patchify.default, (student, 4, 5, group_by, 1 + columns, student.dtype)
        )
    strided = make(2, 3, 9, 14, dtype=torch.float16, device=device, grad=grad)
    strided = strided.to(memory_format=torch.channels_last)
    for s in (strided, strided.float()):
        torch.library.opcheck(ops.patch_cka.default, (s, s.detach(), 4, 5, 0, False, True, grad))
    x = make(2, 6, 5, dtype=torch.float32, device=device, grad=grad)
    y = make(2, 6, 9, dtype=torch.float32, device=device, grad=grad, seed=1)
    torch.library.opcheck(ops.cka.default, (x, y, True, grad, grad))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_the_parts(device):
    ops = torch.ops.pcka
    rows = make(2, 5, 6, dtype=torch.float32, device=device)
    energy = rows.double().square().sum((1, 2))[:, None].repeat(1, 3)
    k, cross = rows @ rows.mT, rows @ rows.mT + 1
    coefficients = make(2, 4, device=device)
    for third in (None, cross):
        torch.library.opcheck(
            ops.gram_alignment_.default,
            (make(2, dtype=torch.float32, device=device), k, k + 1, third, energy, energy, True),
        )
        crosses = [None if third is None else third.clone() for _ in "xy"]
        torch.library.opcheck(
            ops.alignment_gradient_.default,
            (k.clone(), k.clone(), *crosses, k, k + 1, third, coefficients),
        )
    grad = torch.empty(2, 1, 5, 6, device=device)
    torch.library.opcheck(ops.patchify_backward_.default, (grad, rows, 1, 6, 1))
    alone = (rows.clone(), make(2, 3, device=device), grad, None, 1, 6, 1, 1, True)
    torch.library.opcheck(ops.patchify_.default, alone)
    both = make(4, 7, 6, dtype=torch.float32, device=device)
    args = (both, make(4, 3, device=device), grad, grad + 1, 1, 6, 1, 1, False)
    torch.library.opcheck(ops.patchify_.default, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("dim", range(4))
def test_a_gradient_is_scaled_group_by_group_in_any_dense_layout(device, dtype, dim):
    x = make(3, 5, 7, 40, dtype=dtype, device=device)
    factor = make(x.shape[dim], dtype=reference.accumulation_dtype(dtype), device=device, seed=1)
    wanted = (x * factor.view([-1 if i == dim else 1 for i in range(4)])).to(dtype)
    for layout in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        out = torch.full_like(layout, torch.nan)
        torch.ops.pcka.scale_groups_(out, layout, factor, dim)
        assert torch.equal(out, wanted)
        own = layout.clone()
        torch.ops.pcka.scale_groups_(own, own, factor, dim)
        assert torch.equal(own, wanted)
    gaps = x[:, :-1] if dim == 3 else x[..., :-1]
    with pytest.raises(RuntimeError, match="without gaps"):
        torch.ops.pcka.scale_groups_(gaps, gaps, factor, dim)


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


@pytest.mark.parametrize("device", DEVICES)
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


def test_the_compiled_operators_refuse_what_they_cannot_read():
    x = make(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match=r"group_by must be 0 .channel."):
        torch.ops.pcka.patchify(x, 4, 4, 7, 0, x.dtype)
    with pytest.raises(RuntimeError, match=r"center must be 0 .none."):
        torch.ops.pcka.patchify(x, 4, 4, 0, 3, x.dtype)
    with pytest.raises(RuntimeError, match=r"input must be .B, C, H, W., got 3 dimensions"):
        torch.ops.pcka.patchify(x[0], 4, 4, 0, 0, x.dtype)
    with pytest.raises(RuntimeError, match="input must be float16, bfloat16"):
        torch.ops.pcka.patchify(x.long(), 4, 4, 0, 0, torch.float32)
    with pytest.raises(RuntimeError, match="rows must be of the dtype that sums are formed in"):
        torch.ops.pcka.patchify(x, 4, 4, 0, 0, torch.bfloat16)
    with pytest.raises(RuntimeError, match="centered before they are rounded"):
        torch.ops.pcka.patchify(x.bfloat16(), 4, 4, 2, 1, torch.bfloat16)
    with pytest.raises(RuntimeError, match="student must be float16, bfloat16"):
        torch.ops.pcka.patch_cka(x.long(), x.long(), 4, 4, 0, False, True, False)
    with pytest.raises(RuntimeError, match="x must be float16, bfloat16"):
        torch.ops.pcka.cka(x[0].long(), x[0].long(), True, False, False)
    with pytest.raises(RuntimeError, match="teacher must have the student's shape"):
        torch.ops.pcka.patch_cka(x, x[:1], 4, 4, 0, False, True, False)


def in_chunks(student, teacher, patch, group_by, relation, workspace):
    """Alignment, gradient by the student, and the profile of an operator with that workspace."""
    arguments = (patch, patch, GROUPINGS.index(group_by), relation == "columns", True, True)
    with torch.profiler.profile(profile_memory=True) as profile:
        outputs = torch.ops.pcka.patch_cka(student, teacher, *arguments, workspace)
    return outputs, profile


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("group_by", ["channel", "batch"])
def test_a_map_of_several_chunks_equals_the_reference(group_by, relation):
    """Groups are worked on some at a time, in the same buffers, and the last are fewer."""
    shape = (3, 83, 64, 48) if group_by == "channel" else (11, 16, 64, 48)
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    options = {
        "patch_size": (16, 16), "group_by": group_by, "relation": relation, "center": True,
    }  # fmt: skip
    theirs = reference.patch_cka(student, teacher, **options)
    (wanted,) = torch.autograd.grad(theirs.sum(), student)
    (ours, gradient), profile = in_chunks(
        student.detach(), teacher, 16, group_by, relation, 2 << 20
    )
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["pcka::patchify_"] >= 3
    assert error(ours, theirs.detach()) < tolerance(torch.float32)
    assert error(gradient, wanted) < tolerance(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("patch", [16, 4])
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("group_by", ["channel", "batch"])
def test_a_chunk_takes_the_workspace_and_no_more(dtype, patch, relation, group_by):
    """Rows, Grams of either size, factors and terms, in bytes of their dtype: all are counted."""
    shape = (2, 48, 64, 48) if group_by == "channel" else (48, 2, 64, 48)
    student, teacher = (make(*shape, dtype=dtype, seed=seed) for seed in (0, 1))

    def bytes_taken(workspace):
        outputs, profile = in_chunks(student, teacher, patch, group_by, relation, workspace)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return max(itertools.accumulate(changes)) - sum(output.nbytes for output in outputs)

    # torch's product of bfloat16 has some memory of its own, whatever the number of groups.
    own = 1 << 17 if dtype == torch.bfloat16 else 0
    of_all_groups = bytes_taken(1 << 40)
    for share in (3, 6):
        workspace = of_all_groups // share
        assert workspace / 2 < bytes_taken(workspace) <= workspace + own
