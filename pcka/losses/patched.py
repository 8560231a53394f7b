"""Other methods on PCKA's patches: how much of its gain remains when CKA is replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pcka.losses.base import StagewiseLoss
from pcka.losses.checks import as_maps, check_temperature
from pcka.losses.dist import dist_loss
from pcka.losses.kd import kd_loss
from pcka.losses.pcka import PatchSize, as_patches
from pcka.losses.pkd import pkd_loss
from pcka.ops.functional import as_patch_size
from pcka.ops.reference import patchify, resize_to_patches


def patched_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    method: str = "at",
    patch_size: PatchSize = 16,
    temperature: float = 4.0,
) -> Tensor:
    r"""Compare the patches of two feature maps as another method compares its inputs.

    Both maps are tiled as in PCKA: resized up to a multiple of the patch, ``X (C, N, D)`` with
    ``N`` patches and ``D = B * P_H * P_W`` (Zhou et al. 2024, section 4.2, and its ablation).

    - ``"at"``: ``1/C mean((A_s - A_t)^2)``, ``A (N, D) = sum over channels of X``, each row divided
      by its norm (the authors' public code; unlike AT it does not square the activations).
    - ``"kl"``: ``T^2 mean over channels and patches of KL(softmax(x_t / T) || softmax(x_s / T))``,
      the softmax over ``D`` (the authors' public code).
    - ``"pkd"``: ``1/2 mean((n(x_s) - n(x_t))^2)``, ``n(x) = (x - mean) / (std + 1e-6)`` of each
      patch (Cao et al. 2022, equation 2, with a patch in place of a channel; the authors'
      public class of that name does not cut patches).
    - ``"dist"``: mean over channels of :func:`dist_loss`, with patches as samples and the ``D``
      entries as classes (the authors' public code).

    Args:
        student: ``(B, C, H, W)``, any floating dtype.
        teacher: same shape and device; no gradient reaches it.
        method: ``"at"``, ``"kl"``, ``"pkd"`` or ``"dist"``.
        patch_size: ``P`` or ``(P_H, P_W)``, in pixels of the map.
        temperature: ``T > 0``, divides the activations of ``"kl"`` and ``"dist"``.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: maps that differ in shape or device, an unknown method, a patch size or a
            temperature that is not positive, or ``"pkd"`` on patches of a single entry.
    """
    student, teacher = as_maps(student, teacher)
    check_method(method)
    check_temperature(temperature)
    return _METHODS[method](_rows(student, patch_size), _rows(teacher, patch_size), temperature)


def _rows(x: Tensor, patch_size: PatchSize) -> Tensor:
    """``(B, C, H, W)`` -> ``(C, N, B*P_H*P_W)``."""
    patch = as_patch_size(patch_size)
    return patchify(resize_to_patches(x, patch), patch, "channel")


def _at(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    difference = F.normalize(student.sum(0), dim=1) - F.normalize(teacher.sum(0), dim=1)
    return difference.square().mean() / len(student)


def _kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return kd_loss(student.flatten(0, 1), teacher.flatten(0, 1), temperature=temperature)


def _pkd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    if student.shape[2] < 2:
        raise ValueError(
            "patch_size: 'pkd' needs two entries (B * P_H * P_W) or more; use a larger patch"
        )
    # Each patch of each channel as a channel of its own, the entries as its positions.
    as_maps = (rows.flatten(0, 1)[None, :, :, None] for rows in (student, teacher))
    return pkd_loss(*as_maps)


def _dist(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return torch.vmap(partial(dist_loss, temperature=temperature))(student, teacher).mean()


_METHODS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "at": _at,
    "kl": _kl,
    "pkd": _pkd,
    "dist": _dist,
}


def check_method(method: str) -> None:
    """Reject a method without a patched variant."""
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}; got {method!r}")


class Patched(StagewiseLoss):
    """:func:`patched_loss` for several levels: ``{"loss_patched_<method>_<stage>"}``.

    Args:
        method, temperature: of :func:`patched_loss`.
        stages: names of the tapped feature maps.
        weights: factor of each stage's term, or a single one for all.
        patch_sizes: patch size of each stage, ``P`` or ``(P_H, P_W)``, in pixels of its map; a
            single ``P`` serves all stages.
    """

    relational = True
    same_shape = True

    def __init__(
        self,
        *,
        method: str = "at",
        stages: Sequence[str] = ("last",),
        weights: float | Sequence[float] = (1.0,),
        patch_sizes: PatchSize | Sequence[PatchSize] = (16,),
        temperature: float = 4.0,
    ) -> None:
        super().__init__(stages, weights)
        check_method(method)
        check_temperature(temperature)
        self.log_name = f"patched_{method}"
        self.method = method
        self.patch_sizes = as_patches(stages, patch_sizes)
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor, stage: str) -> Tensor:
        return patched_loss(
            student,
            teacher,
            method=self.method,
            patch_size=self.patch_sizes[self.taps.index(stage)],
            temperature=self.temperature,
        )
