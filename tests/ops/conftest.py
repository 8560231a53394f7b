"""The devices that the operators are tested on."""

from __future__ import annotations

import pytest
import torch

import pcka

CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        not (torch.cuda.is_available() and pcka.build_info()["cuda_loaded"]),
        reason="no GPU, or no CUDA operators",
    ),
)


@pytest.fixture(params=["cpu", CUDA])
def device(request) -> str:
    """The CPU, and a GPU where there is one."""
    return request.param
