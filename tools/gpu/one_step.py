"""One profiled step of the operators for each named case, after one that is not profiled."""

from __future__ import annotations

import sys

import torch

from benchmarks.cases import GPU_CASES, Case
from benchmarks.variants import alignments, step


def main(device: str, names: list[str], *, quick: bool) -> None:
    """Run two steps, forward and backward; only the second is profiled."""
    for name in names:
        case: Case = GPU_CASES[name].quick() if quick else GPU_CASES[name]
        inputs, alignment = case.inputs(0, device), alignments(case)["pcka"]
        step(alignment, *inputs)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
        step(alignment, *inputs)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main(
        sys.argv[1],
        [name for name in sys.argv[2:] if not name.startswith("--")],
        quick="--quick" in sys.argv,
    )
