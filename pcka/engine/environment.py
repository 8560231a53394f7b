"""The environment in which a run's results were produced."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import pcka
from pcka.distributed import world_size
from pcka.engine.config import ConfigError

ENVIRONMENT = "environment.json"  # in the folder of a run


def choose_device(name: str) -> torch.device:
    """Return this process's device for ``DEVICE``; auto selects CUDA if available.

    If ``torchrun`` started several processes on a machine, each takes the device of its
    ``LOCAL_RANK``.

    Raises:
        ConfigError: cuda is requested but not available.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("DEVICE: cuda is not available; set DEVICE to cpu or auto")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def autocast(setting: str, device: torch.device) -> torch.autocast:
    """Return the autocast context of a training step's forward passes, as ``AUTOCAST`` sets it."""
    enabled = setting == "bfloat16" or (setting == "auto" and has_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; otherwise float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not in every supported torch: without it, assume the safe answer.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def describe_environment(seed: int, device: torch.device) -> dict[str, object]:
    """Return date, versions, build, commit, command line, seed and device of this process."""
    on_cuda = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(sep=" ", timespec="seconds"),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "torchvision", "pcka")},
        "build_info": pcka.build_info(),
        "git": _git_state(),
        "command_line": sys.argv,
        "seed": seed,
        "bfloat16_hardware": has_bfloat16(device),
        "processes": world_size(),
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "threads": torch.get_num_threads(),
    }


def saved_environment(folder: Path) -> dict[str, Any] | None:
    """The environment that a run recorded in :data:`ENVIRONMENT`; None if missing or damaged."""
    try:
        return dict(json.loads((folder / ENVIRONMENT).read_text()))
    except (OSError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, object] | None:
    """Return the commit and whether the working tree differs; None outside a repository."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
