"""Arithmetic that several losses share: full precision, equal sizes, degenerate levels."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from pcka.losses.checks import WHERE_MAPS_ARE, unlike
from pcka.ops import reference
from pcka.ops.reference import accumulation_dtype

P = ParamSpec("P")
LossFunction = Callable[Concatenate[Tensor, Tensor, P], Tensor]
STANDARDIZING_EPSILON = 1e-7
CONSTANT_UP_TO = {True: 2, False: 1}  # centered? -> number of samples whose CKA is always 1


def without_autocast(loss: LossFunction[P]) -> LossFunction[P]:
    """Decorate a loss of student and teacher: autocast does not round its matrix products."""

    @functools.wraps(loss)
    def exact(student: Tensor, teacher: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        with reference.without_autocast(student.device):
            return loss(student, teacher, *args, **kwargs)

    return exact


def unit_length(x: Tensor, dim: int) -> Tensor:
    """``x / ||x||`` along ``dim``, 0 where ``x`` is zero, even if its squares would overflow."""
    largest = x.detach().abs().amax(dim, keepdim=True)
    return F.normalize(x / largest.masked_fill(largest == 0, 1), dim=dim)


def at_one_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps in float32 or better, each side pooled (adaptive average) to the smaller one.

    Args:
        student: ``(B, C_s, H_s, W_s)``.
        teacher: ``(B, C_t, H_t, W_t)``.

    Raises:
        ValueError: features that are not maps.
    """
    if student.dim() != 4 or teacher.dim() != 4:
        wanted = "feature maps (B, C, H, W)"
        raise unlike(student.shape, teacher.shape, wanted, WHERE_MAPS_ARE)
    height = min(student.shape[2], teacher.shape[2])
    size = (height, min(student.shape[3], teacher.shape[3]))
    return _pooled(student, size), _pooled(teacher, size)


def _pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    x = x.to(accumulation_dtype(x.dtype))
    return x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size)


def standardized_logits(logits: Tensor) -> Tensor:
    r"""Z-scores of each sample's logits: how they rank the classes, without shift and scale.

    ``(z - mean(z)) / (std(z) + 1e-7)``, ``std`` with ``P - 1`` (Sun et al., "Logit
    Standardization in Knowledge Distillation", CVPR 2024, and the authors' public code). A student
    compared by z-scores need not match the teacher's magnitude.

    Args:
        logits: ``(B, P)``, any floating dtype, ``P >= 2``.

    Returns:
        ``(B, P)``: float32, or float64 for float64 input; 0 where a sample's logits are all equal.
    """
    z = logits.to(accumulation_dtype(logits.dtype))
    variance = z.var(-1, keepdim=True)
    # The root of 0 has no derivative, and these samples are 0 whatever they are divided by.
    deviation = variance.masked_fill(variance == 0, 1).sqrt()
    return (z - z.mean(-1, keepdim=True)) / (deviation + STANDARDIZING_EPSILON)


def without_target(logits: Tensor, target: Tensor) -> Tensor:
    """The logits of all classes but each sample's own.

    Gathered, not masked: the host need not wait to learn how many entries a mask selects.

    Args:
        logits: ``(B, P)``.
        target: ``(B,)`` class indices.

    Returns:
        ``(B, P - 1)``, in the order of the classes.
    """
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, columns + (columns >= target[:, None]))


def this_or_other(logits: Tensor, index: Tensor) -> Tensor:
    """Log-probabilities of one class of each sample and of all others together.

    Args:
        logits: ``(B, P)``.
        index: ``(B,)`` class indices.

    Returns:
        ``(B, 2)``.
    """
    others = without_target(logits, index).logsumexp(1, keepdim=True)
    return F.log_softmax(torch.cat([logits.gather(1, index[:, None]), others], dim=1), dim=1)


class DegenerateLevelWarning(UserWarning):
    """A loss leaves a level out because its shape makes the loss constant."""


def leave_out_constant(loss: Tensor, *, samples: int, up_to: int, level: str) -> Tensor:
    """``loss``, or a zero with zero gradient if so few ``samples`` make it constant.

    A loss of relations has nothing to compare between one sample and itself, and often nothing
    between two: their distance is its own mean, and their centered features are ``x`` and ``-x``.
    The zero stays attached to the graph, so a backward pass through it works; the first one at each
    level warns.

    Args:
        loss: scalar, finite.
        samples: number of samples that it relates, for CKA the side ``N`` of the Gram matrices.
        up_to: largest number that makes it constant; of CKA, :data:`CONSTANT_UP_TO`.
        level: name of this level in the warning.
    """
    if samples > up_to:
        return loss
    _warn_once(
        f"{level}: the loss is constant for {samples} sample(s), so this level is left out (loss "
        "0, gradient 0). Use a larger batch or a smaller patch, or drop the level"
    )
    return loss * 0


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, DegenerateLevelWarning, stacklevel=4)
