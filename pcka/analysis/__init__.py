"""Similarity of the layers of two models: CKA between layers over a data set, and their Grams."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pcka.analysis.cka_table import CKATable
from pcka.analysis.grams import u_centered_gram
from pcka.analysis.layers import find_layers
from pcka.analysis.layerwise import MinibatchCKA, cka_matrix, layerwise_cka

if TYPE_CHECKING:  # for type checkers and editors; at run time __getattr__ finds the same names
    from pcka.analysis.gram_figure import grams_figure
    from pcka.analysis.gram_pairs import GramPair, patch_grams, sample_grams

# Not needed in training.
_MODULES = {
    "gram_figure": ("grams_figure",),
    "gram_pairs": ("GramPair", "patch_grams", "sample_grams"),
}

__all__ = [
    "CKATable",
    "GramPair",
    "MinibatchCKA",
    "cka_matrix",
    "find_layers",
    "grams_figure",
    "layerwise_cka",
    "patch_grams",
    "sample_grams",
    "u_centered_gram",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"pcka.analysis.{module}"), name)
    raise AttributeError(f"module 'pcka.analysis' has no attribute {name!r}")
