"""The operators inside what PyTorch builds round them: compile, export, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pcka
from pcka.losses import fcka_loss, lcka_loss, pcka_loss


def make(*shape: int, dtype=torch.float32, grad=False, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)


class Distilled(nn.Module):
    """A convolution for a student, and all three losses on what it makes of an image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, image: Tensor, teacher: Tensor) -> Tensor:
        features = self.student(image)
        pooled, pooled_teacher = features.mean((2, 3)), teacher.mean((2, 3))
        return (
            pcka_loss(features, teacher, patch_size=4)
            + pcka_loss(features, teacher, patch_size=4, group_by="position")
            + fcka_loss(features, teacher)
            + lcka_loss(pooled, pooled_teacher, intra_weight=1.0, inter_weight=1.0)
        )


def image_and_teacher(batch: int = 4, side: int = 14) -> tuple[Tensor, Tensor]:
    return make(batch, 3, 9, side, seed=1), make(batch, 6, 9, side, seed=2)


def loss_and_gradient(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    loss = module(*inputs)
    weight = next(p for p in module.parameters() if p.dim() == 4)
    return loss.detach(), torch.autograd.grad(loss, weight)[0]


def assert_same(ours, theirs, **tolerances) -> None:
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, **tolerances)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    module = Distilled()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for side in (14, 22):
        inputs = image_and_teacher(side=side)
        assert_same(loss_and_gradient(compiled, *inputs), loss_and_gradient(module, *inputs))


@pytest.mark.slow
def test_compiles_with_the_default_backend():
    module, inputs = Distilled(), image_and_teacher()
    compiled = torch.compile(module, fullgraph=True)
    assert_same(loss_and_gradient(compiled, *inputs), loss_and_gradient(module, *inputs))


def test_exports():
    module, inputs = Distilled(), image_and_teacher()
    batch = torch.export.Dim("batch", min=3, max=64)
    exported = torch.export.export(module, inputs, dynamic_shapes=({0: batch}, {0: batch}))
    names = {str(node.target) for node in exported.graph.nodes}
    assert {"pcka.patch_cka.default", "pcka.cka.default"} <= names
    for size in (4, 7):
        inputs = image_and_teacher(batch=size)
        torch.testing.assert_close(exported.module()(*inputs), module(*inputs))


def test_autocast_leaves_the_losses_finite_and_the_gradient_close():
    module, inputs = Distilled(), image_and_teacher()
    plain = loss_and_gradient(module, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = module.student(inputs[0])
        assert student.dtype == torch.bfloat16
        cast = module.student, inputs[0], inputs[1].to(student.dtype)
        loss = pcka_loss(cast[0](cast[1]), cast[2], patch_size=4)
    exact = pcka_loss(module.student(inputs[0]), inputs[1], patch_size=4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=1e-2)
    gradients = [torch.autograd.grad(x, module.student.weight)[0].flatten() for x in (loss, exact)]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999
    assert all(x.isfinite().all() for x in plain)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_is_the_same(mode):
    module, inputs = Distilled(), image_and_teacher()
    with mode():
        loss = module(*inputs)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, module(*inputs).detach())


@pytest.mark.parametrize("group_by", ["channel", "batch", "position"])
def test_a_graph_that_is_kept_gives_its_gradient_again(group_by):
    """A CPU's backward scales in the saved gradient's own memory unless the graph is kept."""
    student, teacher = make(5, 3, 9, 14, grad=True), make(5, 3, 9, 14, seed=1)
    loss = pcka_loss(student, teacher, patch_size=4, group_by=group_by) * 3
    loss = loss + fcka_loss(student, teacher) * 5
    first = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
    last = torch.autograd.grad(loss, student)[0]
    assert torch.equal(first, second) and torch.equal(first, last)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)


def test_losses_that_share_a_map_add_up():
    student, teacher = make(2, 3, 9, 14, grad=True), make(2, 3, 9, 14, seed=1)
    losses = [lambda s, p=p: pcka_loss(s, teacher, patch_size=p) for p in (2, 4, 8)]
    apart = sum(torch.autograd.grad(loss(student), student)[0] for loss in losses)
    together = torch.autograd.grad(sum(loss(student) for loss in losses), student)[0]
    torch.testing.assert_close(together, apart)


def test_checkpointing_and_saved_tensor_hooks_change_nothing():
    module, inputs = Distilled(), image_and_teacher()
    plain = loss_and_gradient(module, *inputs)

    class Checkpointed(Distilled):
        def forward(self, image: Tensor, teacher: Tensor) -> Tensor:
            return checkpoint(super().forward, image, teacher, use_reentrant=False)

    assert_same(loss_and_gradient(Checkpointed(), *inputs), plain)
    with torch.autograd.graph.save_on_cpu():
        assert_same(loss_and_gradient(module, *inputs), plain)


def test_a_second_derivative_is_refused():
    x, y = make(2, 3, 8, 8, grad=True), make(2, 3, 8, 8, seed=1)
    for result in (
        pcka.cka(x.flatten(1), y.flatten(1)),
        pcka.patch_cka(x, y, patch_size=4).sum(),
        pcka.patch_gram(x, patch_size=4).sum(),
    ):
        with pytest.raises(RuntimeError, match=r"differentiable once.*pcka\.ops\.reference"):
            torch.autograd.grad(result, x, create_graph=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_the_same_where_the_graph_is_kept(layout):
    student = make(2, 5, 18, 20).bfloat16().to(memory_format=layout).requires_grad_()
    teacher, weight = make(2, 5, 18, 20, seed=1).bfloat16(), make(5, seed=2)
    loss = (weight * pcka.patch_cka(student, teacher, patch_size=4)).sum()
    kept, again, freed = (
        torch.autograd.grad(loss, student, retain_graph=keep)[0] for keep in (True, True, False)
    )
    assert torch.equal(kept, again) and torch.equal(kept, freed)
    assert kept.is_contiguous(memory_format=layout)


def test_forward_mode_is_refused():
    x, y = make(4, 3, 8, 8), make(4, 3, 8, 8, seed=1)
    for function in (
        lambda s: pcka.cka(s.flatten(1), y.flatten(1)),
        lambda s: pcka.patch_cka(s, y, patch_size=4),
        lambda s: pcka.patch_gram(s, patch_size=4),
    ):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))


# Of two maps, with more than one value each.
OPERATORS = {
    "cka": lambda x, y: pcka.cka(x.flatten(2).mT, y.flatten(2).mT),
    "patch_cka": lambda x, y: pcka.patch_cka(x, y, patch_size=4),
    "position": lambda x, y: pcka.patch_cka(x, y, patch_size=4, group_by="position"),
    "patch_gram": lambda x, y: pcka.patch_gram(x, patch_size=4).sum((1, 2)),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, x: torch.func.grad(lambda s: f(s).sum())(x),
        lambda f, x: torch.func.vjp(f, x),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.grad(lambda s: torch.vmap(f)(torch.stack([s, s])).sum())(x),
    ],
    ids=["grad", "vjp", "jacrev", "around vmap"],
)
def test_derivatives_of_torch_func_are_refused_in_words(operator, differentiate):
    x, y = make(4, 3, 8, 8), make(4, 3, 8, 8, seed=1)
    with pytest.raises(RuntimeError, match=r"no derivative under torch\.func.*autograd\.grad"):
        differentiate(lambda s: operator(s, y), x)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_several_gradients_at_once_are_refused_in_words(operator):
    x, y = make(4, 3, 8, 8, grad=True), make(4, 3, 8, 8, seed=1)
    message = r"one gradient at a time.*is_grads_batched.*pcka\.ops\.reference"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.functional.jacobian(lambda s: operator(s, y), x, vectorize=True)
    values = operator(x, y)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(values, x, torch.eye(len(values)), is_grads_batched=True)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_the_meta_device_gives_the_shapes_forward_and_backward(operator):
    x, y = make(4, 3, 8, 8, grad=True), make(4, 3, 8, 8, seed=1)
    on_meta = x.detach().to("meta").requires_grad_()
    values = operator(on_meta, y.to("meta"))
    assert values.is_meta and values.shape == operator(x, y).shape
    values.sum().backward()
    assert on_meta.grad.is_meta and on_meta.grad.shape == x.shape


@pytest.mark.parametrize("loss", [pcka_loss, fcka_loss])
def test_what_does_not_go_together_is_named(loss):
    student, teacher = make(4, 3, 8, 8), make(4, 3, 8, 8, seed=1)
    with pytest.raises(ValueError, match=r"student and teacher must be .*one device.*cpu and .*m"):
        loss(student, teacher.to("meta"))


@pytest.mark.parametrize("name", ["cka", "patch_cka"])
def test_operators_take_one_dtype(name):
    with pytest.raises(ValueError, match=r"one dtype.*float32 and .*float64.*[Cc]onv"):
        OPERATORS[name](make(4, 3, 8, 8), make(4, 3, 8, 8, seed=1).double())


def test_maps_that_cannot_be_aligned_are_named_with_the_way_out():
    student = make(2, 3, 8, 8)
    for teacher in (make(2, 5, 8, 8), make(2, 3, 4, 8)):
        with pytest.raises(ValueError, match=r"student \(2, 3, 8, 8\) and teacher.*1x1 convol"):
            pcka_loss(student, teacher)
    with pytest.raises(ValueError, match="same samples"):
        fcka_loss(student, make(3, 3, 8, 8))
