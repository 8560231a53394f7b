"""What a run's figures were made with."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import pcka


def choose_device(name: str) -> torch.device:
    """Return the device for ``DEVICE``: auto takes CUDA where there is one.

    Raises:
        ValueError: cuda is asked for and not there.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("DEVICE: cuda is asked for and not available; set DEVICE cpu, or auto")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def describe_environment(seed: int, device: torch.device) -> dict[str, object]:
    """Return versions, build, commit, command line, seed and device of this process."""
    on_cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "torchvision", "pcka")},
        "build_info": pcka.build_info(),
        "git": _git_state(),
        "command_line": sys.argv,
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, object] | None:
    """Return commit and whether the tree differs from it; None outside of a repository."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
