"""What only a GPU shows: streams, graphs, compilation, TF32, large and unaligned maps.

Where there is no GPU the tests that need none run on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import pcka
from benchmarks import accuracy
from benchmarks.cases import MapCase
from benchmarks.ceilings import tensor_float32
from benchmarks.variants import alignments, step

ON_GPU = torch.cuda.is_available() and bool(pcka.build_info()["cuda_loaded"])
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU, or no CUDA operators")
pytestmark = pytest.mark.skipif(
    not pcka.build_info()["extension"], reason="the compiled operators are not loaded"
)

SHAPE = (2, 8, 50, 84)
DTYPES = [torch.float32, torch.bfloat16]
RELATIONS = ["rows", "columns"]
Pair = tuple[Tensor, Tensor]


def pair(seed: int = 0, dtype: torch.dtype = torch.float32) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(SHAPE, generator=generator).to(DEVICE, dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def aligned(student: Tensor, teacher: Tensor, **options) -> Pair:
    """Alignments and the gradient of their mean, with ``cka`` beside ``patch_cka``."""
    alignment = pcka.patch_cka(student, teacher, **options)
    other = pcka.cka(student.flatten(1).t(), teacher.flatten(1).t())
    total = alignment.mean() + other
    return total.detach(), torch.autograd.grad(total, student)[0]


def assert_equal(first: Pair, second: Pair) -> None:
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_close(first: Pair, second: Pair) -> None:
    """Up to the order of summation, which a library may choose by stream or alignment."""
    for a, b in zip(first, second):
        assert distance(a.double(), b.double()) < (1e-5 if a.dtype == torch.float32 else 1e-2)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_work_goes_to_the_current_stream(dtype):
    student, teacher = pair(dtype=dtype)
    expected = aligned(student, teacher)
    late = torch.full_like(student, torch.nan).requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles: on another stream the maps would still be NaN
        with torch.no_grad():
            late.copy_(student)
        found = aligned(late, teacher)
    side.synchronize()
    assert_close(found, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_by", ["channel", "batch", "position"])
def test_a_captured_step_replays_bit_for_bit_and_reads_what_is_there_then(dtype, group_by):
    student, teacher = pair(dtype=dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            aligned(student, teacher, group_by=group_by)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = aligned(student, teacher, group_by=group_by)
    for seed in (1, 0):
        with torch.no_grad():
            for held, new in zip((student, teacher), pair(seed, dtype)):
                held.copy_(new)
        replays = []
        for _ in range(3):
            graph.replay()
            replays.append(tuple(t.clone() for t in captured))
        assert_equal(replays[0], replays[1])
        assert_equal(replays[0], replays[2])
        assert_close(replays[0], aligned(student, teacher, group_by=group_by))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relation", RELATIONS)
def test_every_run_gives_the_same_bits(dtype, relation):
    student, teacher = pair(dtype=dtype)
    first = aligned(student, teacher, relation=relation)
    for _ in range(3):
        assert_equal(aligned(student, teacher, relation=relation), first)


@pytest.mark.slow
def test_inductor_compiles_the_step():
    student, teacher = pair()

    def loss(x: Tensor) -> Tensor:
        return pcka.patch_cka(torch.tanh(x), teacher).mean() + pcka.cka(x[0, 0], teacher[0, 0])

    compiled = torch.compile(loss, fullgraph=True)
    expected = torch.autograd.grad(loss(student), student)[0]
    torch.testing.assert_close(compiled(student), loss(student))
    torch.testing.assert_close(torch.autograd.grad(compiled(student), student)[0], expected)


def test_inference_mode_gives_the_same_alignment():
    student, teacher = pair()
    with torch.inference_mode():
        found = pcka.patch_cka(student, teacher)
    assert not found.requires_grad
    torch.testing.assert_close(found, pcka.patch_cka(student, teacher).detach(), rtol=0, atol=0)


@needs_gpu
@pytest.mark.parametrize("relation", RELATIONS)
def test_tf32_costs_no_more_than_in_eager_code(relation):
    """Where products may round to TF32, the error stays within twice that of eager code."""
    case = MapCase(name="map", shape=(2, 16, 100, 168), relation=relation)
    student, teacher = case.inputs(0, DEVICE)
    exact = gradient(accuracy.reference_of(case), student.double(), teacher.double())
    functions = alignments(case)
    with tensor_float32(True):
        ours, eager = (gradient(functions[name], student, teacher) for name in ("pcka", "eager"))
    assert distance(ours, exact) <= 2 * distance(eager, exact)
    assert distance(ours, exact) < 1e-2


def gradient(alignment: Callable, student: Tensor, teacher: Tensor) -> Tensor:
    return step(alignment, student.detach().requires_grad_(), teacher)[0].double()


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("inputs", ["random", "mean 100"])
@pytest.mark.parametrize("patch", [16, 8, 4])
@pytest.mark.parametrize("relation", RELATIONS)
def test_bfloat16_is_at_most_twice_as_far_from_float64_as_eager_code(relation, patch, inputs):
    case = MapCase(name="map", shape=(2, 16, 50, 84), relation=relation, patch=patch)
    found = accuracy.record(case, torch.bfloat16, inputs, range(2), DEVICE)
    for quantity in ("alignment", "gradient"):
        ratio = found["ratios"]["eager"][quantity]
        assert ratio is None or ratio <= accuracy.LIMIT, (quantity, found["errors"])


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, instead of whatever was there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_by", ["channel", "batch", "position"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_every_output_is_written_and_nothing_else_is_read(dtype, group_by, relation):
    student, teacher = pair(dtype=dtype)
    options = {"group_by": group_by, "relation": relation}
    expected = aligned(student, teacher, **options)
    with poisoned():
        found = aligned(student, teacher, **options)
    assert found[1].isfinite().all()
    assert_equal(found, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [1, 3])
def test_maps_off_the_allocators_alignment_give_the_same(dtype, offset):
    def moved(x: Tensor) -> Tensor:
        room = x.new_zeros(x.numel() + offset)
        room[offset:] = x.flatten()
        return room[offset:].view(x.shape)

    student, teacher = (x.detach() for x in pair(dtype=dtype))
    for own, other in ((moved(student), teacher), (student, moved(teacher))):
        found = aligned(own.requires_grad_(), other, patch_size=8)
        assert_close(found, aligned(student.requires_grad_(), teacher, patch_size=8))
        student.requires_grad_(False)


@needs_gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_map_of_more_than_two_to_the_31_elements(layout):
    """The last channels of a map of which no 32-bit offset reaches the end."""
    shape, last = (2, 65_600, 128, 128), 8
    assert torch.Size(shape).numel() > 2**31
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    student = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).to(memory_format=layout)
    teacher = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).to(memory_format=layout)
    alignment = pcka.patch_cka(student.requires_grad_(), teacher)
    (grad,) = torch.autograd.grad(alignment.sum(), student)
    own = student.detach()[:, -last:].contiguous().requires_grad_()
    expected = pcka.patch_cka(own, teacher[:, -last:].contiguous())
    torch.testing.assert_close(alignment[-last:], expected, rtol=1e-3, atol=1e-3)
    (wanted,) = torch.autograd.grad(expected.sum(), own)
    assert distance(grad[:, -last:].double(), wanted.double()) < 1e-2
