"""Peak growth of memory during a call."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_HIGH_WATER_MARK = "5"


def peak_growth(call: Callable[[], object], device: torch.device | None = None) -> int:
    """Return the peak growth of memory during the call, in bytes.

    On CUDA, the memory allocated by torch; on the CPU (Linux), the resident memory of this process,
    after malloc has returned what it kept from earlier calls to the system.

    Args:
        call: warm it up first, so that libraries and workspaces are already loaded.
        device: the device that the call uses; the CPU if None.
    """
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text(_RESET_HIGH_WATER_MARK)
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Read a memory size of this process, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")
