"""Centered kernel alignment for knowledge distillation (RCKA and PCKA, Zhou et al. 2024).

Submodules are imported lazily, so that ``--help`` is fast. If the environment variable
``PCKA_REQUIRE`` is ``cpu`` or ``cuda``, the import fails unless the compiled operators of that
device are in use.
"""

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; at run time __getattr__ finds the same names
    from pcka import losses
    from pcka.checkpoint import load_weights, save_student
    from pcka.distiller import Distiller
    from pcka.ops import build_info, cka, patch_cka, patch_gram
    from pcka.taps import FeatureTap
    from pcka.teacher import Ensemble, FrozenTeacher

_MODULES = {
    "checkpoint": ("load_weights", "save_student"),
    "distiller": ("Distiller",),
    "ops": ("build_info", "cka", "patch_cka", "patch_gram"),
    "taps": ("FeatureTap",),
    "teacher": ("Ensemble", "FrozenTeacher"),
}

try:
    __version__ = version("pcka")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Distiller",
    "Ensemble",
    "FeatureTap",
    "FrozenTeacher",
    "build_info",
    "cka",
    "load_weights",
    "losses",
    "patch_cka",
    "patch_gram",
    "save_student",
]


def __getattr__(name: str) -> Any:
    if name == "losses" or name in _MODULES:
        return importlib.import_module(f"pcka.{name}")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"pcka.{module}"), name)
    raise AttributeError(f"module 'pcka' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if os.environ.get("PCKA_REQUIRE"):
    importlib.import_module("pcka.ops")
