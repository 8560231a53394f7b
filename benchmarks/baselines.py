"""Baselines for the operators, written plainly and without handicap.

The functions run in the dtype of their input and, except for ``strong_patch_cka``, are
differentiated by autograd; ``Products`` is the work that no implementation based on matrix products
can avoid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case


def eager_cka(x: Tensor, y: Tensor) -> Tensor:
    """Centered CKA, ``(N, D_x), (N, D_y)`` -> scalar, or ``(G, N, D)`` twice -> ``(G,)``.

    The cosine of the two Grams (Zhou et al. 2024, Theorem 1). It divides by the norms before it
    multiplies; otherwise float16 would overflow.
    """
    x, y = x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True)
    return F.cosine_similarity((x @ x.mT).flatten(-2), (y @ y.mT).flatten(-2), dim=-1)


def eager_patch_cka(
    student: Tensor, teacher: Tensor, *, patch_size: int, group_by: str, relation: str
) -> Tensor:
    """All groups at once: ``(B, C, H, W)`` twice -> ``(G,)``."""
    x, y = (_patches(t, patch_size, group_by) for t in (student, teacher))
    return eager_cka(x.mT, y.mT) if relation == "columns" else eager_cka(x, y)


def loop_patch_cka(
    student: Tensor, teacher: Tensor, *, patch_size: int, group_by: str, relation: str
) -> Tensor:
    """All patches at once, then one group after another, as in public implementations.

    The main cost is indexing each group, ``x[g]``: the backward of every index writes a gradient of
    the size of all groups.
    """
    x, y = (_patches(t, patch_size, group_by) for t in (student, teacher))
    return _one_by_one((x[g] for g in range(len(x))), y, relation)


def split_loop_patch_cka(
    student: Tensor, teacher: Tensor, *, patch_size: int, group_by: str, relation: str
) -> Tensor:
    """A loop that suits autograd: the map is split once, and each group processed end to end."""
    x, y = (_each_group(t, patch_size, group_by) for t in (student, teacher))
    return _one_by_one(x, y, relation)


def _one_by_one(xs: Iterable[Tensor], ys: Iterable[Tensor], relation: str) -> Tensor:
    pairs = ((x.T, y.T) if relation == "columns" else (x, y) for x, y in zip(xs, ys))
    return torch.stack([eager_cka(x, y) for x, y in pairs])


def _resize(x: Tensor, patch: int) -> Tensor:
    """Resize ``(B, C, H, W)`` up to the next multiple of the patch size."""
    size = [-(-extent // patch) * patch for extent in x.shape[2:]]
    if list(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _patches(x: Tensor, patch: int, group_by: str) -> Tensor:
    """``(B, C, H, W)`` -> ``(G, N, D)``."""
    cut = _resize(x, patch).unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    order = {  # of (B, C, n_h, P, n_w, P)
        "channel": (1, 2, 4, 0, 3, 5),
        "batch": (0, 2, 4, 1, 3, 5),
        "position": (3, 5, 2, 4, 0, 1),
    }[group_by]
    moved = cut.permute(order)
    if group_by == "position":
        moved = moved.flatten(0, 1)
    return moved.flatten(1, 2).flatten(2)


def _each_group(x: Tensor, patch: int, group_by: str) -> Iterator[Tensor]:
    """``(B, C, H, W)`` -> ``(N, D)``, G times."""
    if group_by == "position":  # every pixel belongs to several groups: nothing to split
        yield from _patches(x, patch, group_by).unbind()
        return
    for part in x.split(1, dim=1 if group_by == "channel" else 0):
        windows = F.unfold(_resize(part, patch), patch, stride=patch)  # (b, c*P*P, N)
        yield windows.permute(2, 0, 1).flatten(1)


def strong_patch_cka(
    student: Tensor, teacher: Tensor, *, patch_size: int, group_by: str, relation: str
) -> Tensor:
    """The best that eager code can do: the operator's own algebra, without its kernels.

    The forward pass computes the gradient in closed form, with one product per operand, and uses
    the Grams of the cheaper side.
    """
    x, y = (_patches(t, patch_size, group_by) for t in (student, teacher))
    n, d = x.shape[1:]
    if relation == "columns":
        x, y = x.mT, y.mT
        direct = 3 * d < 5 * n
    else:
        direct = 3 * n <= 5 * d
    return _ClosedForm.apply(x, y, direct)


class _ClosedForm(torch.autograd.Function):
    """CKA of ``(G, m, k)`` twice over the ``m`` samples, with its gradient w.r.t. the first.

    Direct: by the ``m x m`` Grams; otherwise by the ``k x k`` ones, ``<Z Z', W W'> = |Z' W|^2``.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, w: Tensor, direct: bool) -> Tensor:
        z, w = z - z.mean(-2, keepdim=True), w - w.mean(-2, keepdim=True)
        if direct:
            k, l, cross = z @ z.mT, w @ w.mT, None
            inner = _inner(k, l)
        else:
            k, l, cross = z.mT @ z, w.mT @ w, w.mT @ z
            inner = _inner(cross, cross)
        own, other = _inner(k, k), _inner(l, l)
        alignment = inner * (own * other).rsqrt()
        if ctx.needs_input_grad[0]:
            a = (2 * (own * other).rsqrt())[:, None, None].to(k.dtype)
            b = (2 * alignment / own)[:, None, None].to(k.dtype)
            if cross is None:
                gradient = (a * l - b * k) @ z
            else:
                gradient = torch.baddbmm(w @ (a * cross), z, b * k, alpha=-1)
            ctx.save_for_backward(gradient)
        return alignment

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None, None].to(gradient.dtype), None, None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return inner products ``(G,)`` of matrices, at least in float32: bfloat16 is too coarse."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return torch.linalg.vecdot(a.flatten(1).to(wide), b.flatten(1).to(wide))


class Products:
    """The bare products of an alignment and its gradient, into preallocated memory.

    ``torch.bmm(out=)`` over all groups, on rows ``(G, N, D)`` already cut, resized, centered and
    contiguous. Of the two methods (``csrc/alignment.cpp``) it uses the operator's:

    - direct: two Grams, and one product per gradient;
    - cross: two Grams and a cross-Gram, and two products per gradient.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
        _, n, d = case.rows
        self.direct = 3 * d < 5 * n if case.columns else 3 * n <= 5 * d
        rows = [torch.randn(case.rows, dtype=dtype, device=device) for _ in range(2)]
        z, w = (x.mT if case.columns == self.direct else x for x in rows)
        k, l, cross = (z.new_empty(z.shape[0], z.shape[1], z.shape[1]) for _ in range(3))
        first, second = (z.new_empty(z.shape) for _ in range(2))
        self.plan = [(z, z.mT, k), (w, w.mT, l)]
        if self.direct:
            gradients = [(k, z, first), (l, w, second)]
            self.plan += gradients if case.both else gradients[:1]
        else:
            gradients = [(cross, w, first), (k, z, second), (cross.mT, z, first), (l, w, second)]
            self.plan += [(z, w.mT, cross), *(gradients if case.both else gradients[:2])]

    def __call__(self) -> None:
        for left, right, out in self.plan:
            torch.bmm(left, right, out=out)

    @classmethod
    def flops_of(cls, case: Case) -> int:
        """Return the number of multiplications and additions of all products."""
        plan = cls(case, torch.float32, "meta").plan
        return sum(2 * left.numel() * right.shape[2] for left, right, _ in plan)
