"""The compiled operators: calls, shapes for tracing (fake), and gradients (autograd).

The only module that touches ``torch.ops.pcka``. Schemas and conventions: ``csrc/schema.cpp``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pcka.ops._loader import available, disuse
from pcka.ops.reference import accumulation_dtype

_BATCH, _POSITION = 1, 2  # codes of group_by
_NONE, _OVER_ROWS = 0, 1  # codes of center


def _workspace_bytes(mebibytes: str | None) -> int:
    """Parse PCKA_WORKSPACE_MIB: what patch_cka may use for a chunk of groups on a GPU.

    Returns 0 if it is not set: the operator's default of 256 MiB.
    """
    if not mebibytes:
        return 0
    if not mebibytes.isdecimal() or int(mebibytes) == 0:
        raise ImportError(
            f"PCKA_WORKSPACE_MIB must be a positive whole number of MiB, got {mebibytes!r}"
        )
    return int(mebibytes) << 20


_WORKSPACE = _workspace_bytes(os.environ.get("PCKA_WORKSPACE_MIB"))


def cka(x: Tensor, y: Tensor, center: bool) -> Tensor:
    """``(G, N, D_x), (G, N, D_y)`` -> ``(G,)``."""
    _refuse_tangents(x, y)
    alignment, _, _ = torch.ops.pcka.cka(x, y, center, _needs_grad(x), _needs_grad(y))
    return alignment


def patchify(x: Tensor, patch: tuple[int, int], group_by: int, center: bool) -> Tensor:
    """``(B, C, H, W)`` -> ``(G, N, D)``, resized and centered over the patches."""
    _refuse_tangents(x)
    centering = _OVER_ROWS if center else _NONE
    rows, _ = torch.ops.pcka.patchify(x, *patch, group_by, centering, accumulation_dtype(x.dtype))
    return rows


def patch_cka(
    student: Tensor,
    teacher: Tensor,
    patch: tuple[int, int],
    group_by: int,
    columns: bool,
    center: bool,
) -> Tensor:
    """``(B, C, H, W)`` twice -> ``(G,)``."""
    _refuse_tangents(student, teacher)
    workspace = 0 if student.is_cpu else _WORKSPACE
    alignment, _ = torch.ops.pcka.patch_cka(
        student, teacher, *patch, group_by, columns, center, _needs_grad(student), workspace
    )
    return alignment


def _refuse_tangents(*inputs: Tensor) -> None:
    """Refuse forward-mode derivatives (torch.func.jvp), which would silently be 0.

    Also refuse the backward ones of torch.func, for which torch's own error does not name the
    operator.
    """
    if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(
            "pcka: this operator has no forward-mode derivative. Use reverse mode, or "
            "the functions of pcka.ops.reference"
        )
    if torch._C._are_functorch_transforms_active() and any(map(_func_differentiates, inputs)):
        raise RuntimeError(
            "pcka: this operator has no derivative under torch.func (grad, vjp, jacrev, hessian). "
            "Use torch.autograd.grad or .backward(), or the functions of pcka.ops.reference"
        )


def _func_differentiates(x: Tensor) -> bool:
    """Whether torch.func differentiates with respect to ``x``, within or around its vmap."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _needs_grad(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a gradient computed in the forward pass, before loss scaling; see csrc/dtypes.h."""
    return torch.float32 if dtype == torch.float16 else dtype


def _rows_shape(x: Tensor, patch_h: int, patch_w: int, group_by: int) -> tuple[int, int, int]:
    b, c, h, w = x.shape
    n, area = -(-h // patch_h) * -(-w // patch_w), patch_h * patch_w
    if group_by == _POSITION:
        return area, n, b * c
    return (b, n, c * area) if group_by == _BATCH else (c, n, b * area)


# --- fake: shapes and dtypes without values ------------------------------------------------------


def _cka_fake(
    x: Tensor, y: Tensor, center: bool, needs_grad_x: bool, needs_grad_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype)),
        x.new_empty(x.shape, dtype=_gradient_dtype(x.dtype)) if needs_grad_x else x.new_empty(0),
        y.new_empty(y.shape, dtype=_gradient_dtype(y.dtype)) if needs_grad_y else y.new_empty(0),
    )


def _patchify_fake(
    x: Tensor, patch_h: int, patch_w: int, group_by: int, center: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = _rows_shape(x, patch_h, patch_w, group_by)
    return (
        x.new_empty(shape, dtype=dtype),
        x.new_empty((shape[0], 3), dtype=torch.float64),
    )


def _in_place_fake(*_: Any) -> None:
    """For the operators that only write into their arguments."""


def _gram_alignment_fake(alignment: Tensor, k: Tensor, *_: Any) -> Tensor:
    return k.new_empty((k.shape[0], 4), dtype=torch.float64)


def _patch_cka_fake(
    student: Tensor,
    teacher: Tensor,
    patch_h: int,
    patch_w: int,
    group_by: int,
    columns: bool,
    center: bool,
    needs_grad: bool,
    workspace: int = 0,
) -> tuple[Tensor, Tensor]:
    rows = _rows_shape(student, patch_h, patch_w, group_by)
    wide = accumulation_dtype(student.dtype)
    alignment = student.new_empty(rows[0], dtype=wide)
    if not needs_grad:
        return alignment, student.new_empty(0)
    if group_by == _POSITION:
        return alignment, student.new_empty(rows, dtype=wide)
    dtype = _gradient_dtype(student.dtype)
    if dtype == student.dtype:
        return alignment, torch.empty_like(student)
    return alignment, student.new_empty(student.shape, dtype=dtype)


# --- autograd ------------------------------------------------------------------------------------
# cka and patch_cka compute their gradients in the forward pass; the backward pass scales them by
# the incoming gradient of each group. That is differentiable once; a second derivative is refused.


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse create_graph=True: to autograd, a gradient computed in the forward is a constant."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "pcka: this operator is differentiable once; create_graph=True asks for a second "
                "derivative. Use the functions of pcka.ops.reference where one is needed"
            )
        batched = torch._C._functorch.is_legacy_batchedtensor  # of torch.autograd's own vmap
        if any(batched(grad) for grad in grads if grad is not None):
            raise RuntimeError(
                "pcka: this operator takes one gradient at a time. Leave is_grads_batched=True or "
                "vectorize=True out, or use the functions of pcka.ops.reference"
            )
        return backward(ctx, *grads)

    return checked


def _scaled(gradient: Tensor, factor: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """``gradient`` times ``factor (G,)`` along ``dim``, in ``dtype``.

    On a CPU, in place if the gradient will not be needed again: the first touch of fresh memory
    costs more there than the product. A GPU's allocator returns memory that is already there.
    """
    if type(gradient) is not Tensor:  # traced
        shape = [-1 if i == dim else 1 for i in range(gradient.dim())]
        return (gradient * factor.view(shape)).to(dtype)
    own = gradient.is_cpu and gradient.dtype == dtype and not _graph_is_kept()
    out = gradient if own else torch.empty_like(gradient, dtype=dtype)
    torch.ops.pcka.scale_groups_(out, gradient, factor.contiguous(), dim)
    return out


def _graph_is_kept() -> bool:
    """Whether the current backward was called with retain_graph=True; True if unknown."""
    asks = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asks is None or bool(asks())


def _mark_rest(ctx: Any, *outputs: Tensor) -> None:
    """Mark outputs without a gradient; else autograd would make one of zeros, as large as a map."""
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)


def _cka_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad_x, grad_y = output
    _mark_rest(ctx, grad_x, grad_y)
    ctx.save_for_backward(grad_x, grad_y)
    ctx.needs, ctx.dtype = inputs[3:5], inputs[0].dtype


@_once
def _cka_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    grads = (
        _scaled(saved, grad, 0, ctx.dtype) if needed else None
        for saved, needed in zip(ctx.saved_tensors, ctx.needs)
    )
    return (*grads, None, None, None)


def _patch_cka_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, _, ctx.patch_h, ctx.patch_w, ctx.group_by = inputs[:5]
    ctx.needs = inputs[7]
    _mark_rest(ctx, output[1])
    ctx.save_for_backward(output[1])
    ctx.shape, ctx.dtype = student.shape, student.dtype


@_once
def _patch_cka_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    if grad is None or not ctx.needs:
        return (None,) * 9
    if ctx.group_by == _POSITION:
        rows = _scaled(gradient, grad, 0, gradient.dtype)
        result = rows.new_empty(ctx.shape, dtype=ctx.dtype)
        torch.ops.pcka.patchify_backward_(result, rows, ctx.patch_h, ctx.patch_w, ctx.group_by)
    else:
        result = _scaled(gradient, grad, 0 if ctx.group_by == _BATCH else 1, ctx.dtype)
    return (result, *[None] * 8)


def _patchify_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.patch, ctx.group_by, ctx.center, _ = inputs
    _mark_rest(ctx, output[1])
    ctx.shape, ctx.dtype = x.shape, x.dtype


@_once
def _patchify_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    result = grad.new_empty(ctx.shape, dtype=ctx.dtype)
    # Centering is its own adjoint; rows (G, N, D) are centered as a map of N one-pixel patches.
    pixels = grad.transpose(1, 2).unsqueeze(3)
    rows, _ = torch.ops.pcka.patchify(pixels, 1, 1, _BATCH, ctx.center, grad.dtype)
    torch.ops.pcka.patchify_backward_(result, rows, *ctx.patch, ctx.group_by)
    return (result, *[None] * 5)


_FAKES: dict[str, Callable[..., Any]] = {
    "cka": _cka_fake,
    "patchify": _patchify_fake,
    "patchify_": _in_place_fake,
    "patchify_backward_": _in_place_fake,
    "gram_alignment_": _gram_alignment_fake,
    "alignment_gradient_": _in_place_fake,
    "scale_groups_": _in_place_fake,
    "patch_cka": _patch_cka_fake,
}

_META = torch.device("meta")
if available(_META) and not all(hasattr(torch.ops.pcka, name) for name in _FAKES):
    disuse("they were compiled from different sources; reinstall to recompile")
if available(_META):
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"pcka::{_name}", _fake)
    for _name, _backward, _setup in (
        ("cka", _cka_backward, _cka_setup),
        ("patchify", _patchify_backward, _patchify_setup),
        ("patch_cka", _patch_cka_backward, _patch_cka_setup),
    ):
        torch.library.register_autograd(f"pcka::{_name}", _backward, setup_context=_setup)
