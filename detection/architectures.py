"""The detectors of this project's own, each imported where a configuration names it."""

from __future__ import annotations

import importlib
from types import ModuleType

from detectron2.config import CfgNode
from omegaconf import DictConfig

# Meta-architecture -> the module that registers it, whose function `lazy_<module>` gives its
# LazyConfig, for use outside.
MODULES = {"FCOS": "fcos", "GFL": "gfl", "RepPoints": "reppoints"}


def import_architecture(name: str) -> None:
    """Let detectron2 know the detector of that name, where it is one of these."""
    if name in MODULES:
        _module(name)


def lazy_config(name: str, cfg: CfgNode) -> DictConfig:
    """Return the LazyConfig of one of these detectors, from the YAML keys.

    Raises:
        ConfigError: values that it does not have, or a backbone that a LazyConfig cannot describe.
    """
    lazy: DictConfig = getattr(_module(name), f"lazy_{MODULES[name]}")(cfg)
    return lazy


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"detection.{MODULES[name]}")
