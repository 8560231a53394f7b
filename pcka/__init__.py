"""Centered kernel alignment for knowledge distillation (RCKA and PCKA, Zhou et al. 2024)."""

from importlib.metadata import PackageNotFoundError, version

from pcka import losses
from pcka.checkpoint import load_weights, save_student
from pcka.distiller import Distiller
from pcka.ops import build_info, cka, patch_cka, patch_gram
from pcka.taps import FeatureTap
from pcka.teacher import Ensemble, FrozenTeacher

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
