"""The public functions: argument checks, then the compiled operator or the eager reference."""

from __future__ import annotations

import torch
from torch import Tensor

from pcka.ops import _library, reference

GROUPINGS = ("channel", "batch", "position")
RELATIONS = ("rows", "columns")
LEAST_UNBIASED = 4  # samples below which the unbiased HSIC is not defined
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def cka(
    x: Tensor,
    y: Tensor,
    *,
    center: bool = True,
    unbiased: bool = False,
    row_normalize: bool = False,
) -> Tensor:
    r"""Centered kernel alignment of two representations of the same ``N`` samples.

    ``CKA(X, Y) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` with ``K = X X'``, ``L = Y Y'``,
    ``HSIC(K, L) = <H K H, H L H>_F`` and ``H = I - 11'/N`` (Kornblith et al. 2019, eq. 4;
    Zhou et al. 2024, eq. 3). Without centering it is the cosine of ``vec(X X')`` and
    ``vec(Y Y')`` (Zhou et al. 2024, Theorem 1).

    Args:
        x: ``(N, D_x)``, or ``(G, N, D_x)`` for ``G`` independent groups; any floating dtype.
        y: ``(N, D_y)`` or ``(G, N, D_y)``, of the same dtype and device as ``x``.
        center: subtract each column's mean over the ``N`` samples first.
        unbiased: estimate HSIC without bias (Song et al. 2012, eq. 5), which includes centering;
            needs ``N >= 4``. The plain estimate is close to 1 on noise when ``N`` is far below
            ``D``. A group whose own unbiased HSIC is not positive has alignment 0.
        row_normalize: divide row ``i`` of each Gram by ``sqrt(K_ii)``, after centering.

    Returns:
        A scalar, or ``(G,)``: float32, or float64 for float64 input. In ``[0, 1]`` unless
        ``unbiased``. Differentiable once in ``x`` and ``y``. A group that is constant over its
        samples (zero, when uncentered) has alignment 0 and gradient 0.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or ``unbiased`` with ``N < 4``, without
            centering, or with ``row_normalize``.
    """
    _check_tensor("x", x, dims=(2, 3))
    _check_pair("x", x, "y", y)
    if x.dim() != y.dim() or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            "cka: x and y must hold the same samples, (N, D_x) and (N, D_y) or (G, N, D_x) and "
            f"(G, N, D_y); got x {tuple(x.shape)} and y {tuple(y.shape)}"
        )
    if unbiased:
        _check_unbiased(x.shape[-2], center=center, row_normalize=row_normalize)
    # Row normalisation and the unbiased estimate serve logits and analysis: eager is enough.
    if unbiased or row_normalize or not _library.available(x.device):
        return reference.cka(x, y, center=center, unbiased=unbiased, row_normalize=row_normalize)
    if x.dim() == 2:
        return _library.cka(x[None], y[None], center).squeeze(0)
    return _library.cka(x, y, center)


def patch_gram(
    x: Tensor,
    *,
    patch_size: int | tuple[int, int] = 16,
    group_by: str = "channel",
    center: bool = True,
) -> Tensor:
    r"""Gram matrices between the patches of a feature map.

    The map is resized bilinearly (``align_corners=False``) up to the next multiple of the patch
    and cut into ``N = n_h n_w`` patches; ``K_g = X_g X_g'``, with each column's mean over the
    patches subtracted first when ``center`` (Zhou et al. 2024, section 4.2).

    Args:
        x: ``(B, C, H, W)``, any floating dtype and memory layout.
        patch_size: ``P`` or ``(P_H, P_W)``, in pixels of the map.
        group_by: ``"channel"``: ``X (C, N, B*P_H*P_W)``; ``"batch"``: ``(B, N, C*P_H*P_W)``;
            ``"position"``: ``(P_H*P_W, N, B*C)``.
        center: center over the patches.

    Returns:
        ``(G, N, N)``: float32, or float64 for float64 input. Differentiable once, in ``x``.

    Raises:
        ValueError: ``x`` is not a floating four-dimensional map, or the patch size or grouping is
            invalid.
    """
    _check_tensor("x", x, dims=(4,))
    patch = as_patch_size(patch_size)
    check_choice("group_by", group_by, GROUPINGS)
    if not _library.available(x.device):
        return reference.patch_gram(x, patch_size=patch, group_by=group_by, center=center)
    rows = _library.patchify(x, patch, GROUPINGS.index(group_by), center)
    with reference.without_autocast(x.device):
        return rows @ rows.mT


def patch_cka(
    student: Tensor,
    teacher: Tensor,
    *,
    patch_size: int | tuple[int, int] = 16,
    group_by: str = "channel",
    relation: str = "rows",
    center: bool = True,
) -> Tensor:
    r"""Centered kernel alignment between the patches of two feature maps, group by group.

    Both maps become ``X (G, N, D)`` as in :func:`patch_gram`; ``relation="rows"`` gives
    ``CKA(X_g, Y_g)`` between the ``N x N`` Grams of patches, ``relation="columns"``
    ``CKA(X_g', Y_g')``, centered over ``D`` (Zhou et al. 2024, section 4.2: PCKA and its
    inter-relation term).

    Args:
        student: ``(B, C, H, W)``, any floating dtype and memory layout.
        teacher: same shape, dtype and device; must not require grad.
        patch_size: ``P`` or ``(P_H, P_W)``, in pixels of the map.
        group_by: ``"channel"`` (the method), ``"batch"`` or ``"position"`` (its ablation).
        relation: ``"rows"`` or ``"columns"``.
        center: center the Grams.

    Returns:
        ``(G,)`` alignments in ``[0, 1]``: float32, or float64 for float64 input. Differentiable
        once, in ``student``. A group that is constant over its patches has alignment 0 and
        gradient 0.

    Raises:
        ValueError: the maps cannot be aligned, the teacher requires grad, or the patch size,
            grouping or relation is invalid.
    """
    _check_tensor("student", student, dims=(4,))
    _check_pair("student", student, "teacher", teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            "patch_cka: student and teacher must have one shape (B, C, H, W); got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}. Bring the student to the "
            "teacher's width with a 1x1 convolution, or resize one of the maps, before the loss"
        )
    if teacher.requires_grad:
        raise ValueError(
            "patch_cka: teacher requires grad, but no gradient is formed for it; "
            "pass teacher.detach()"
        )
    patch = as_patch_size(patch_size)
    check_choice("group_by", group_by, GROUPINGS)
    check_choice("relation", relation, RELATIONS)
    if not _library.available(student.device):
        return reference.patch_cka(
            student,
            teacher,
            patch_size=patch,
            group_by=group_by,
            relation=relation,
            center=center,
        )
    return _library.patch_cka(
        student, teacher, patch, GROUPINGS.index(group_by), relation == "columns", center
    )


def _check_tensor(name: str, x: Tensor, dims: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be dense, got {x.layout}; pass {name}.to_dense()")
    if x.dim() not in dims:
        wanted = " or ".join(str(d) for d in dims)
        raise ValueError(f"{name} must have {wanted} dimensions, got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; convert it first"
        )
    if x.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")


def _check_pair(name_x: str, x: Tensor, name_y: str, y: Tensor) -> None:
    _check_tensor(name_y, y, dims=(x.dim(),))
    if x.dtype != y.dtype:
        raise ValueError(
            f"{name_x} and {name_y} must have one dtype, got {x.dtype} and {y.dtype}; "
            f"convert {name_y} with .to({name_x}.dtype)"
        )
    if x.device != y.device:
        raise ValueError(
            f"{name_x} and {name_y} must be on one device, got {x.device} and {y.device}"
        )


def _check_unbiased(n: int, *, center: bool, row_normalize: bool) -> None:
    if not center:
        raise ValueError("unbiased=True estimates the centered HSIC; it needs center=True")
    if row_normalize:
        raise ValueError("unbiased=True is not defined for row-normalised Grams; choose one")
    if n < LEAST_UNBIASED:
        raise ValueError(f"unbiased=True needs at least {LEAST_UNBIASED} samples, got N = {n}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def as_patch_size(patch_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return ``(P_H, P_W)``; refuse anything but a positive int or a pair of them."""
    pair = tuple(patch_size) if isinstance(patch_size, list | tuple) else (patch_size, patch_size)
    # A bool is an int in Python, but never meant as a size.
    if len(pair) != 2 or not all(
        type(p) is not bool and isinstance(p, int) and p >= 1 for p in pair
    ):
        raise ValueError(
            f"patch_size must be a positive int or a pair of them (P_H, P_W); got {patch_size!r}"
        )
    return pair[0], pair[1]
