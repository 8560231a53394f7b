"""The oracle: centered kernel alignment in plain, eager, differentiable PyTorch.

Functions with a compiled counterpart in :mod:`pcka.ops.functional` take the same arguments and give
the same results, and are written for readability. The compiled operators are tested against them,
and they run where those are not available.

Inputs may have any floating dtype; half precision is widened to float32 first, so sums and results
are float32 (float64 for float64 input).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> torch.autocast:
    """Context in which autocast is off on ``device``, so that it rounds no matrix product."""
    # torch refuses even to switch autocast off on the meta device, where nothing is computed.
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def patchify(x: Tensor, patch_size: tuple[int, int], group_by: str) -> Tensor:
    """Cut a map into patches: ``(B, C, H, W)`` -> ``(G, N, D)``, neither resized nor centered.

    ``N = n_h * n_w`` patches in row-major order; ``H`` and ``W`` are multiples of the patch.
    ``group_by``: ``"channel"`` -> ``(C, N, B*P_H*P_W)``, ``"batch"`` -> ``(B, N, C*P_H*P_W)``,
    ``"position"`` -> ``(P_H*P_W, N, B*C)``.
    """
    b, c, h, w = x.shape
    p_h, p_w = patch_size
    n_h, n_w = h // p_h, w // p_w
    cut = x.reshape(b, c, n_h, p_h, n_w, p_w)
    if group_by == "channel":
        return cut.permute(1, 2, 4, 0, 3, 5).reshape(c, n_h * n_w, b * p_h * p_w)
    if group_by == "batch":
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, n_h * n_w, c * p_h * p_w)
    return cut.permute(3, 5, 2, 4, 0, 1).reshape(p_h * p_w, n_h * n_w, b * c)


def resize_to_patches(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Resize ``(B, C, H, W)`` bilinearly up to the next multiple of the patch (a no-op on one)."""
    size = tuple(-(-extent // patch) * patch for extent, patch in zip(x.shape[2:], patch_size))
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _rows(x: Tensor, patch_size: tuple[int, int], group_by: str) -> Tensor:
    x = x.to(accumulation_dtype(x.dtype))
    return patchify(resize_to_patches(x, patch_size), patch_size, group_by)


def _scale(x: Tensor) -> Tensor:
    """Scale each group by a power of two, so that its largest magnitude is below 1.

    That rounds nothing, CKA does not depend on it, and no square can leave the dtype's range.
    """
    _, exponent = torch.frexp(x.detach().abs().amax((1, 2), keepdim=True))
    most = 126 if x.dtype == torch.float32 else 1000
    return x * torch.exp2(-exponent.clamp(-most, most).to(x.dtype))


def _center(x: Tensor, *, center: bool) -> tuple[Tensor, Tensor]:
    """Center the rows of ``(G, N, D)``; also return which groups are degenerate, ``(G,)`` bool.

    A group is degenerate if centering leaves only rounding error, ``|X_c|^2 <= (8 eps)^2 |X|^2``,
    or if it is all zeros.
    """
    energy = x.square().sum((1, 2))
    if not center:
        return x, energy == 0
    centered = x - x.mean(1, keepdim=True)
    threshold = (8 * torch.finfo(x.dtype).eps) ** 2
    return centered, centered.square().sum((1, 2)) <= threshold * energy


def _unit(x: Tensor) -> Tensor:
    """Scale each group to unit Frobenius norm: CKA does not change, and no Gram can overflow."""
    norm = torch.linalg.vector_norm(x.detach(), dim=(1, 2), keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


def _row_normalize(gram: Tensor) -> Tensor:
    """``K / sqrt(diag K)[:, None]``; a diagonal entry of 0 up to rounding gives a zero row."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    threshold = (8 * torch.finfo(gram.dtype).eps) ** 2
    positive = diagonal > threshold * diagonal.amax(-1, keepdim=True)
    scale = torch.where(positive, diagonal, 1).rsqrt() * positive
    return gram * scale[..., None]


def unbiased_hsic(k: Tensor, l: Tensor) -> Tensor:
    r"""Unbiased estimate of HSIC from two uncentered Grams (Song et al. 2012, eq. 5).

    ``[tr(K~L~) + (1'K~1)(1'L~1) / ((N-1)(N-2)) - 2/(N-2) 1'K~L~1] / (N(N-3))``, where ``~`` sets
    the diagonal to zero. ``(G, N, N)`` each, ``N >= 4`` -> ``(G,)``.
    """
    n = k.shape[-1]
    off_diagonal = 1 - torch.eye(n, dtype=k.dtype, device=k.device)
    k, l = k * off_diagonal, l * off_diagonal
    k_rows, l_rows = k.sum(-1), l.sum(-1)
    trace = (k * l).sum((-2, -1))
    totals = k_rows.sum(-1) * l_rows.sum(-1) / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (k_rows * l_rows).sum(-1)
    return (trace + totals - cross) / (n * (n - 3))


def _alignment(kl: Tensor, kk: Tensor, ll: Tensor, degenerate: Tensor) -> Tensor:
    """``kl / sqrt(kk * ll)`` per group; 0, with gradient 0, if the group is degenerate."""
    degenerate = degenerate | (kk == 0) | (ll == 0)
    product = torch.where(degenerate, 1, kk) * torch.where(degenerate, 1, ll)
    return torch.where(degenerate, 0, kl / product.sqrt())


def _cka_groups(
    x: Tensor, y: Tensor, *, center: bool, unbiased: bool = False, row_normalize: bool = False
) -> Tensor:
    """CKA of each group, ``(G, N, D_x), (G, N, D_y)`` -> ``(G,)``."""
    x, x_degenerate = _center(_scale(x), center=center)
    y, y_degenerate = _center(_scale(y), center=center)
    x, y = _unit(x), _unit(y)
    k, l = x @ x.mT, y @ y.mT
    if row_normalize:
        k, l = _row_normalize(k), _row_normalize(l)
    if unbiased:
        hsic_xx, hsic_yy = unbiased_hsic(k, k), unbiased_hsic(l, l)
        # An unbiased estimate of a self-similarity may be negative: nothing to align with.
        degenerate = x_degenerate | y_degenerate | (hsic_xx <= 0) | (hsic_yy <= 0)
        return _alignment(unbiased_hsic(k, l), hsic_xx, hsic_yy, degenerate)
    kl, kk, ll = ((a * b).sum((1, 2)) for a, b in ((k, l), (k, k), (l, l)))
    return _alignment(kl, kk, ll, x_degenerate | y_degenerate)


def cka(
    x: Tensor,
    y: Tensor,
    *,
    center: bool = True,
    unbiased: bool = False,
    row_normalize: bool = False,
) -> Tensor:
    """Reference implementation of :func:`pcka.cka`."""
    with without_autocast(x.device):
        x, y = x.to(accumulation_dtype(x.dtype)), y.to(accumulation_dtype(y.dtype))
        grouped = x.dim() == 3
        if not grouped:
            x, y = x[None], y[None]
        result = _cka_groups(x, y, center=center, unbiased=unbiased, row_normalize=row_normalize)
        return result if grouped else result[0]


def patch_gram(x: Tensor, *, patch_size: tuple[int, int], group_by: str, center: bool) -> Tensor:
    """Reference implementation of :func:`pcka.patch_gram`."""
    with without_autocast(x.device):
        rows, _ = _center(_rows(x, patch_size, group_by), center=center)
        return rows @ rows.mT


def patch_cka(
    student: Tensor,
    teacher: Tensor,
    *,
    patch_size: tuple[int, int],
    group_by: str,
    relation: str,
    center: bool,
) -> Tensor:
    """Reference implementation of :func:`pcka.patch_cka`."""
    with without_autocast(student.device):
        x, y = _rows(student, patch_size, group_by), _rows(teacher, patch_size, group_by)
        if relation == "columns":
            x, y = x.mT, y.mT
        return _cka_groups(x, y, center=center)
