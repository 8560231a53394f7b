"""The compared implementations, bound to a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pcka
from benchmarks.baselines import (
    Products,
    eager_cka,
    eager_patch_cka,
    loop_patch_cka,
    split_loop_patch_cka,
    strong_patch_cka,
)
from benchmarks.cases import Case, MapCase, dtype_name
from benchmarks.harness import Call

Alignment = Callable[[Tensor, Tensor], Tensor]


def alignments(case: Case) -> dict[str, Alignment]:
    """Return variant -> alignment function. Matrices are one group: nothing to loop over."""
    if not isinstance(case, MapCase):
        return {"eager": eager_cka, "pcka": pcka.cka}
    functions: dict[str, Callable[..., Tensor]] = {
        "loop": loop_patch_cka,
        "split loop": split_loop_patch_cka,
        "eager": eager_patch_cka,
        "strong eager": strong_patch_cka,
        "pcka": pcka.patch_cka,
    }
    settings: dict[str, Any] = case.settings
    return {name: partial(function, **settings) for name, function in functions.items()}


def step(alignment: Alignment, student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """Run forward and backward of the mean alignment; return the gradients that are required."""
    wanted = [t for t in (student, teacher) if t.requires_grad]
    return torch.autograd.grad(alignment(student, teacher).mean(), wanted)


def timed_calls(case: Case, seed: int, device: str = "cpu") -> dict[str, Call]:
    """Return every variant as a call without arguments: the steps, and the bare products.

    Half-precision maps also get the bare products in their own dtype, and the operator on float32
    maps.
    """
    student, teacher = case.inputs(seed, device)
    calls: dict[str, Call] = {
        name: partial(step, alignment, student, teacher)
        for name, alignment in alignments(case).items()
    }
    calls["products"] = Products(case, torch.float32, device)
    if case.dtype != torch.float32:
        calls[f"products {dtype_name(case.dtype)}"] = Products(case, case.dtype, device)
        wide = replace(case, dtype=torch.float32)
        calls["pcka float32"] = partial(step, alignments(wide)["pcka"], *wide.inputs(seed, device))
    return calls
