"""The machine, its software, and whether the compiled operators are in use on it.

Exits with 1 if they are not: the later stages would say nothing about them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tools.gpu import output

PACKAGES = ("torch", "torchvision", "triton", "numpy", "pytest", "fvcore", "pycocotools")
TOOLS = ("nvcc", "ncu", "compute-sanitizer")
CARD = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``environment.json``; fail if the operators are not in use."""
    given = output.arguments(__doc__, arguments)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "card": _said_by("nvidia-smi", f"--query-gpu={CARD}", "--format=csv,noheader"),
        "versions": {name: _version(name) for name in PACKAGES},
        "tools": {name: output.program(name) is not None for name in TOOLS},
        "commit": _said_by("git", "rev-parse", "HEAD"),
    }
    lines = [f"{found['card'] or 'no GPU'}; python {found['python']}, {found['cores']} cores"]
    try:
        found |= _operators(given.device)
    except (ImportError, RuntimeError) as error:
        output.write(given.output, "environment", found, [*lines, f"not in use: {error}"])
        sys.exit(1)
    info = found["build_info"]
    lines.append(
        f"torch {info['running_torch']} (CUDA {info['running_cuda']}); operators of torch "
        f"{info['torch_version']}, CUDA {info['cuda_version']}, {' '.join(info['cuda_archs'])}"
    )
    output.write(given.output, "environment", found, lines)


def _operators(device: str) -> dict[str, Any]:
    """What is loaded, after calling it once.

    Raises:
        ImportError: PCKA_REQUIRE asks for operators that are not available.
        RuntimeError: there is no such device, or the code does not run on it.
    """
    import torch

    import pcka

    x = torch.randn(2, 3, 20, 30, device=device)
    alignment = pcka.patch_cka(x, x, patch_size=4)
    if not bool((alignment - 1).abs().max() < 1e-4):
        raise RuntimeError(f"patch_cka of a map with itself is {alignment.tolist()}, not 1")
    info = pcka.build_info()
    if not info["cuda_loaded" if device == "cuda" else "extension"]:
        raise RuntimeError(f"the compiled operators are not loaded: {info['fallback']}")
    found: dict[str, Any] = {"build_info": info}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found["properties"] = {
            "name": card.name,
            "capability": [card.major, card.minor],
            "multiprocessors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
            "l2_bytes": card.L2_cache_size,
        }
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said_by(*command: str) -> str | None:
    """Standard output; None if the program is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


if __name__ == "__main__":
    main()
