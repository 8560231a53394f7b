"""The Grams of a feature in student and teacher, as the losses compare them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pcka.ops import cka, patch_cka, patch_gram
from pcka.ops.functional import as_patch_size


@dataclass(frozen=True)
class GramPair:
    """The Grams of a feature in student and teacher, over the same rows.

    Attributes:
        student: ``(N, N)``, float32, or float64 for float64 features: the mean over groups of the
            Grams, each scaled to unit Frobenius norm; a group that is constant over its rows counts
            as 0.
        teacher: likewise.
        alignment: ``(G,)``, CKA of each group.
        grid: number of patches down and across that make up the ``N`` rows; None for samples.
    """

    student: Tensor
    teacher: Tensor
    alignment: Tensor
    grid: tuple[int, int] | None = None

    @property
    def cka(self) -> float:
        """Mean over groups: 1 minus the loss."""
        return float(self.alignment.double().mean())


@torch.no_grad()
def patch_grams(
    student: Tensor,
    teacher: Tensor,
    *,
    patch_size: int | tuple[int, int] = 16,
    group_by: str = "channel",
    center: bool = True,
) -> GramPair:
    r"""The Grams between the patches of two feature maps, as aligned by PCKA.

    ``1/G sum_g K_g / ||K_g||_F``, with ``K_g`` from :func:`pcka.patch_gram` (Zhou et al. 2024,
    section 4.2 and figure 2). With unit norms ``1 - CKA_g = 1/2 ||K_s,g - K_t,g||_F^2`` (its
    Theorem 2), so the loss reduces the difference of the two. In the mean over channels,
    differences of opposite signs cancel; pass ``student[:, c : c + 1]`` and
    ``teacher[:, c : c + 1]`` for the Grams of channel ``c`` alone.

    Args:
        student: ``(B, C, H, W)``, any floating dtype.
        teacher: same shape, dtype and device.
        patch_size: ``P`` or ``(P_H, P_W)``, in pixels of the map.
        group_by: ``"channel"`` (the method), ``"batch"`` or ``"position"``.
        center: center over the patches.

    Returns:
        Grams ``(N, N)`` of the ``N = n_h n_w`` patches in row-major order, and the ``(G,)``
        alignments of :func:`pcka.patch_cka`.

    Raises:
        ValueError: as :func:`pcka.patch_cka`.
    """
    patch = as_patch_size(patch_size)
    teacher = teacher.detach()

    def aligned(a: Tensor, b: Tensor) -> Tensor:
        return patch_cka(a, b, patch_size=patch, group_by=group_by, center=center)

    alignment = aligned(student, teacher)
    own, other = (
        _mean_of_units(
            patch_gram(x, patch_size=patch, group_by=group_by, center=center), aligned(x, x)
        )
        for x in (student.detach(), teacher)
    )
    (height, width), (p_h, p_w) = student.shape[2:], patch
    return GramPair(own, other, alignment, (-(-height // p_h), -(-width // p_w)))


@torch.no_grad()
def sample_grams(student: Tensor, teacher: Tensor, *, center: bool = True) -> GramPair:
    r"""The Grams between the samples of a batch, as aligned by FCKA.

    ``K / ||K||_F``, ``K = H X X' H`` with the features ``X (N, D)`` (Zhou et al. 2024, section
    4.1).

    Args:
        student: ``(N, C_s, H_s, W_s)`` or ``(N, D_s)``, any floating dtype.
        teacher: ``(N, C_t, H_t, W_t)`` or ``(N, D_t)``, same dtype and device.
        center: center over the samples.

    Returns:
        Grams ``(N, N)``, and the ``(1,)`` alignment of :func:`pcka.cka`.

    Raises:
        ValueError: as :func:`pcka.cka`.
    """
    rows, others = (feature.detach().flatten(1) for feature in (student, teacher))

    def unit(x: Tensor) -> Tensor:
        # Each sample is a patch of one row, in a map with one channel.
        patch = (1, x.shape[1])
        gram = patch_gram(x[None, None], patch_size=patch, group_by="batch", center=center)
        return _mean_of_units(gram, cka(x, x, center=center)[None])

    return GramPair(unit(rows), unit(others), cka(rows, others, center=center)[None])


def _mean_of_units(gram: Tensor, with_itself: Tensor) -> Tensor:
    """Mean of unit-norm Grams, ``(G, N, N)`` -> ``(N, N)``; mere rounding error counts as 0.

    Args:
        gram: of the groups.
        with_itself: ``(G,)``, CKA of each group with itself: 1, or 0 for a degenerate group.
    """
    norm = torch.linalg.matrix_norm(gram.double())  # whose squares float32 may not hold
    scale = torch.where((with_itself > 0.5) & (norm > 0), 1 / norm, 0)
    return (gram * scale[:, None, None]).mean(0).to(gram.dtype)
