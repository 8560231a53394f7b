"""The devices that the operators are tested on."""

from __future__ import annotations

from collections.abc import Iterator

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


@pytest.fixture(autouse=True, scope="module")
def several_threads() -> Iterator[None]:
    """Two threads at least, whatever `make test` gives a process: operators share their work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", CUDA])
def device(request) -> str:
    """The CPU, and a GPU where there is one."""
    return request.param
