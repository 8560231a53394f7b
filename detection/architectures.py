"""This project's own detectors, each imported only when a configuration names it."""

from __future__ import annotations

import importlib
from types import ModuleType

from detectron2.config import CfgNode
from omegaconf import DictConfig

# Meta-architecture -> the module that registers it. The module's function `lazy_<module>` returns
# the LazyConfig for use outside this project.
MODULES = {"FCOS": "fcos", "GFL": "gfl", "RepPoints": "reppoints"}


def import_architecture(name: str) -> None:
    """Register the named detector with detectron2 if it is one of these."""
    if name in MODULES:
        _module(name)


def lazy_config(name: str, cfg: CfgNode) -> DictConfig:
    """Return the LazyConfig of one of these detectors, built from the YAML keys.

    Raises:
        ConfigError: values that are invalid for the detector, or a backbone that a LazyConfig
            cannot describe.
    """
    lazy: DictConfig = getattr(_module(name), f"lazy_{MODULES[name]}")(cfg)
    return lazy


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"detection.{MODULES[name]}")
