"""The compiled operators by themselves, called directly; skipped where they are not loaded."""

from __future__ import annotations

import itertools

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


def make(*shape, dtype=torch.float64, device="cpu", grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x.to(device=device, dtype=dtype).requires_grad_(grad)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance, absolute where the reference is (nearly) zero."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / max(b.norm().item(), 1e-2)).item()


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


def arguments_of_operators() -> dict[str, list]:
    """What each operator that takes several tensors may be called with."""
    x, energy, k = make(2, 3, 8, 8), make(3, 3), make(3, 4, 4)
    rows, matrix, coefficients = make(3, 4, 32), make(2, 5, 6), make(3, 4)
    return {
        "cka": [matrix, matrix, True, False, False],
        "patch_cka": [x, x, 4, 4, 0, False, True, False],
        "patchify_": [make(6, 4, 32), make(6, 3), x, x, 4, 4, 0, 1, False],
        "patchify_backward_": [x, rows, 4, 4, 0],
        "gram_alignment_": [make(3), k, k, k, energy, energy, True],
        "alignment_gradient_": [k, k, k, k, k, k, k, coefficients],
        "scale_groups_": [x, x, make(3), 1],
    }


@pytest.mark.parametrize("name", arguments_of_operators())
def test_a_tensor_of_another_device_is_refused_by_every_operator(name):
    """Called as the dispatcher calls it where the first of them is on a GPU."""
    operator, arguments = getattr(torch.ops.pcka, name).default, arguments_of_operators()[name]
    on_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    names = [argument.name for argument in operator._schema.arguments]
    operator.redispatch(on_cpu, *arguments)
    tensors = [i for i, value in enumerate(arguments) if isinstance(value, torch.Tensor)]
    for i in tensors:
        moved = [*arguments[:i], arguments[i].to("meta"), *arguments[i + 1 :]]
        with pytest.raises(RuntimeError, match="must be on the device of") as refused:
            operator.redispatch(on_cpu, *moved)
        assert any(f"{given} must be on the device of" in str(refused.value) for given in names)


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
    assert error(ours, theirs.detach()) < 1e-4
    assert error(gradient, wanted) < 1e-4


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
