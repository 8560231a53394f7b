"""The detectors of this project's own, which a LazyConfig describes for use outside."""

from __future__ import annotations

from detection.fcos import lazy_fcos
from detection.gfl import lazy_gfl
from detection.reppoints import lazy_reppoints

# Meta-architecture -> its LazyConfig, from the YAML keys; their modules register themselves.
LAZY = {"FCOS": lazy_fcos, "GFL": lazy_gfl, "RepPoints": lazy_reppoints}
