"""Adapters: small trained layers that bring features to another width or size.

Their sizes come from a dry run. :func:`fit` places a single adapter, :func:`fit_maps` makes one for
each of a loss's maps, and :func:`adapt` applies an adapter to features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from pcka.losses.base import Outputs
from pcka.losses.checks import WHERE_MAPS_ARE, unlike
from pcka.losses.numerics import at_one_size
from pcka.ops.reference import accumulation_dtype

M = TypeVar("M", bound=nn.Module)
_ATTRIBUTES = frozenset(dir(nn.ModuleDict()))


def regressor(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Sequential:
    """FitNet's regressor: a convolution that also matches the size, then batch norm and ReLU.

    The convolution is 3x3 with stride 2 if the student's map has twice the side lengths of the
    teacher's. For any other map that is no smaller, its kernel is ``1 + s - t``. For a map that is
    ``f`` times smaller, it is transposed, with a kernel of ``2 f`` and stride ``f`` (Romero et al.
    2015, equation 3, sized as in Tian et al. 2020, where ``f`` is 2).

    Args:
        student_shape: ``(B, C_s, H_s, W_s)``.
        teacher_shape: ``(B, C_t, H_t, W_t)``, of features after their activation.

    Returns:
        A module, ``(B, C_s, H_s, W_s)`` -> ``(B, C_t, H_t, W_t)``.

    Raises:
        ValueError: shapes that are not maps, or a student's map that is smaller, but not by the
            same whole factor in height and width.
    """
    c_s, h_s, w_s = _map_shape(student_shape, "student")
    c_t, h_t, w_t = _map_shape(teacher_shape, "teacher")
    conv: nn.Module
    if (h_s, w_s) == (2 * h_t, 2 * w_t):
        conv = nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
    elif h_s >= h_t and w_s >= w_t:
        conv = nn.Conv2d(c_s, c_t, (1 + h_s - h_t, 1 + w_s - w_t))
    elif (factor := h_t // h_s) > 1 and (factor * h_s, factor * w_s) == (h_t, w_t):
        edge, odd = (factor + 1) // 2, factor % 2
        conv = nn.ConvTranspose2d(c_s, c_t, 2 * factor, factor, padding=edge, output_padding=odd)
    else:
        wanted = "maps, the student's no smaller than the teacher's, or smaller by a whole factor"
        raise unlike(student_shape, teacher_shape, wanted, "Choose a stage whose sizes are closer")
    return nn.Sequential(conv, nn.BatchNorm2d(c_t), nn.ReLU())


def pointwise(
    c_in: int, c_out: int, *, norm: bool = False, relu: bool = False, bias: bool = True
) -> nn.Sequential:
    """A 1x1 convolution, ``(B, c_in, H, W)`` -> ``(B, c_out, H, W)``, optionally with a ReLU.

    With batch norm, which comes before the ReLU, the convolution has no bias.
    """
    layers: list[nn.Module] = [nn.Conv2d(c_in, c_out, 1, bias=bias and not norm)]
    if norm:
        layers.append(nn.BatchNorm2d(c_out))
    if relu:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def pooled(x: Tensor) -> Tensor:
    """Features ``(B, C)`` unchanged, maps ``(B, C, H, W)`` averaged over their positions.

    Raises:
        ValueError: features of any other shape, such as tokens.
    """
    if x.dim() not in (2, 4):
        raise ValueError(
            f"features must be pooled (B, D) or maps (B, C, H, W), got {tuple(x.shape)}. "
            f"{WHERE_MAPS_ARE}"
        )
    return x if x.dim() == 2 else x.flatten(2).mean(2)


class PooledLinear(nn.Linear):
    """A linear layer on :func:`pooled` features."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pooled(x))


class ModulesByTap(nn.ModuleDict):
    """Modules keyed by tap name, which may contain dots or be a word such as ``"pop"``."""

    def __getitem__(self, tap: str) -> nn.Module:
        return super().__getitem__(self._key(tap))

    def __setitem__(self, tap: str, module: nn.Module) -> None:
        super().__setitem__(self._key(tap), module)

    def __contains__(self, tap: str) -> bool:
        return super().__contains__(self._key(tap))

    def _key(self, tap: str) -> str:
        """The submodule's name, which is never an attribute of the dictionary itself."""
        key = tap.replace(".", "/")
        return f"{key}/" if key in _ATTRIBUTES else key


def fit(module: M, feature: Tensor) -> M:
    """Move ``module`` to the device of ``feature``: in float32, or float64 if the feature is."""
    return module.to(device=feature.device, dtype=accumulation_dtype(feature.dtype))


def fit_maps(
    make: Callable[[int, int], nn.Module],
    student: Outputs,
    teacher: Outputs,
    stages: Sequence[str],
) -> ModulesByTap:
    """Make a module for each stage, fitted to the student's map.

    Args:
        make: makes a module from the student's and the teacher's number of channels.
        student: outputs of the dry run.
        teacher: likewise.
        stages: names of features ``(B, C, H, W)``.

    Raises:
        ValueError: a feature that is not a map.
    """
    modules = ModulesByTap()
    for stage in stages:
        feature, other = student.feature(stage), teacher.feature(stage)
        at_one_size(feature, other)  # rejects features that are not maps
        modules[stage] = fit(make(feature.shape[1], other.shape[1]), feature)
    return modules


def prepared(module: M | None, loss: str) -> M:
    """Return ``module``, which is None or an empty ``ModuleDict`` until ``prepare`` is called.

    Raises:
        RuntimeError: ``prepare`` was not called.
    """
    if module is None or (isinstance(module, nn.ModuleDict) and not module):
        raise RuntimeError(
            f"{loss} is not prepared. Call Distiller.prepare once, before creating the optimizer"
        )
    return module


def adapt(adapter: nn.Module, feature: Tensor) -> Tensor:
    """``adapter(feature)``, with the feature cast to the dtype of the adapter's parameters.

    Under autocast the adapter's layers choose their dtype, as in any other model.
    """
    return adapter(feature.to(next(adapter.parameters()).dtype))


def _map_shape(shape: Sequence[int], model: str) -> tuple[int, int, int]:
    """``C, H, W`` of a feature map's shape."""
    if len(shape) != 4:
        raise ValueError(
            f"{model} must be a feature map (B, C, H, W), got {tuple(shape)}. {WHERE_MAPS_ARE}"
        )
    _, channels, height, width = shape
    return channels, height, width
