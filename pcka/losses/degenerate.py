"""Alignments that the shape of their input makes constant: nothing can be learned from them."""

from __future__ import annotations

import functools
import warnings

from torch import Tensor


class DegenerateLevelWarning(UserWarning):
    """A loss leaves a level out, because its shape makes the alignment constant."""


def leave_out_constant(loss: Tensor, *, samples: int, center: bool, level: str) -> Tensor:
    """``loss``, or a zero with zero gradient where ``samples`` makes the alignment constant.

    One sample always aligns with one sample, and two centered samples (``x`` and ``-x``) with any
    other two: CKA is 1 whatever the features are. The zero stays attached to the graph, so a
    backward pass through it works; the first one of each level warns.

    Args:
        loss: scalar computed from the alignment.
        samples: ``N``, the side of the Gram matrices.
        center: whether the Gram matrices are centered.
        level: what the warning calls this level.
    """
    if samples > (2 if center else 1):
        return loss
    _warn_once(
        f"{level}: the {'centered' if center else 'uncentered'} alignment of {samples} sample(s) "
        "is constant, so this level is left out (loss 0, gradient 0). Take a larger batch, a "
        "smaller patch, or drop the level"
    )
    return loss * 0


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, DegenerateLevelWarning, stacklevel=4)
