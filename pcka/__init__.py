"""Centered kernel alignment for knowledge distillation (RCKA and PCKA, Zhou et al. 2024)."""

from importlib.metadata import PackageNotFoundError, version

from pcka.distiller import Distiller
from pcka.ops import build_info, cka, patch_cka, patch_gram

try:
    __version__ = version("pcka")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Distiller", "build_info", "cka", "patch_cka", "patch_gram"]
