"""Finds and loads the compiled operators, and says what is in use."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import warnings
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent


class _Loaded:
    """Which devices have compiled operators, and why the others have none."""

    def __init__(self) -> None:
        self.devices: set[str] = set()
        self.reasons: dict[str, str] = {}
        self.info = _compiled_info()
        self._load("cpu", self._cpu_obstacle())
        self._load("cuda", self._cuda_obstacle())
        self._check_required(os.environ.get("PCKA_REQUIRE", ""))

    def _cpu_obstacle(self) -> str | None:
        if self.info is None:
            return "they were not compiled; reinstall with a C++ compiler to get them"
        minimum = self.info["minimum_torch"]
        if _version(torch.__version__) < _version(minimum):
            return f"they need torch >= {minimum}, this is {torch.__version__}"
        return None

    def _cuda_obstacle(self) -> str | None:
        if "cpu" not in self.devices:
            return self.reasons["cpu"]
        assert self.info is not None  # the CPU operators were loaded
        compiled, runtime = self.info["cuda_version"], torch.version.cuda
        if not compiled:
            return f"CUDA code was not compiled ({self.info['note']})"
        if runtime is None or runtime.split(".")[0] != compiled.split(".")[0]:
            return f"they were compiled with CUDA {compiled}, and this torch " + (
                f"has CUDA {runtime}" if runtime else "is a CPU build"
            )
        return None

    def _load(self, device: str, obstacle: str | None) -> None:
        if obstacle is None:
            try:
                torch.ops.load_library(_PACKAGE / f"_{device}.abi3.so")
            except OSError as error:
                obstacle = f"the library did not load: {error}"
        if obstacle is None:
            self.devices.add(device)
        else:
            self.reasons[device] = obstacle

    def _check_required(self, device: str) -> None:
        if device not in ("", "cpu", "cuda"):
            raise ImportError(f"PCKA_REQUIRE must be cpu or cuda, got {device!r}")
        if device and device not in self.devices:
            raise ImportError(
                f"PCKA_REQUIRE={device}: the compiled operators are not in use on {device}: "
                f"{self.reasons[device]}. Unset PCKA_REQUIRE to use the eager reference instead"
            )


def _compiled_info() -> dict[str, str] | None:
    """The build information of csrc/build_info.cpp; None if nothing was compiled."""
    try:
        answer = ctypes.CDLL(str(_PACKAGE / "_build_info.abi3.so")).pcka_build_info
    except OSError:
        return None
    answer.restype = ctypes.c_char_p
    return json.loads(answer())


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


_loaded = _Loaded()


def available(device: torch.device) -> bool:
    """Whether compiled operators serve this device; warns once if they do not."""
    kind = "cpu" if device.type == "meta" else device.type
    if kind in _loaded.devices:
        return True
    _warn_fallback(kind)
    return False


def disuse(reason: str) -> None:
    """Use the eager reference on every device, for a reason that is only found after loading."""
    _loaded.reasons.update(dict.fromkeys(_loaded.devices, reason))
    _loaded.devices.clear()
    _loaded._check_required(os.environ.get("PCKA_REQUIRE", ""))


@functools.cache
def _warn_fallback(kind: str) -> None:
    reason = _loaded.reasons.get(kind, "no operators are written for this device")
    warnings.warn(
        f"pcka: the compiled operators are not in use on {kind}: {reason}. "
        "Falling back to the eager PyTorch reference: the same results, slower.",
        stacklevel=4,
    )


def build_info() -> dict[str, object]:
    """What was compiled, with what, and what is in use.

    Returns:
        ``extension`` (bool): the compiled CPU operators are loaded; ``cuda`` (bool): CUDA code was
        compiled; ``cuda_loaded`` (bool): it is also loaded under this torch; ``cuda_archs``: e.g.
        ``["sm_80", "sm_90"]``; ``compiler``, ``cuda_version`` (of nvcc), ``torch_version`` (whose
        headers were used), ``minimum_torch``, ``note`` (of the build): None if nothing was
        compiled; ``running_torch``, ``running_cuda``; ``fallback``: device -> why it uses the eager
        reference.
    """
    info = _loaded.info
    archs = info["cuda_archs"] if info else ""
    fields = ("compiler", "cuda_version", "torch_version", "minimum_torch", "note")
    return {
        "extension": "cpu" in _loaded.devices,
        "cuda": bool(archs),
        "cuda_loaded": "cuda" in _loaded.devices,
        "cuda_archs": archs.split(",") if archs else [],
        **{field: (info[field] or None) if info else None for field in fields},
        "running_torch": torch.__version__,
        "running_cuda": torch.version.cuda,
        "fallback": dict(_loaded.reasons),
    }
