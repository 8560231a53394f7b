"""Losses in full precision, whatever the models run in and however large their features are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import torch.nn.functional as F
from torch import Tensor

from pcka.ops import reference

P = ParamSpec("P")
LossFunction = Callable[Concatenate[Tensor, Tensor, P], Tensor]


def without_autocast(loss: LossFunction[P]) -> LossFunction[P]:
    """Decorator of a loss of student and teacher: autocast does not round its matrix products."""

    @functools.wraps(loss)
    def exact(student: Tensor, teacher: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        with reference.without_autocast(student.device):
            return loss(student, teacher, *args, **kwargs)

    return exact


def unit_length(x: Tensor, dim: int) -> Tensor:
    """``x / ||x||`` along ``dim``, 0 where it is zero, for values whose squares would overflow."""
    largest = x.detach().abs().amax(dim, keepdim=True)
    return F.normalize(x / largest.masked_fill(largest == 0, 1), dim=dim)
