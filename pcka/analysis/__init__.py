"""How alike the layers of two models are: CKA between layers over a data set, and their Grams."""

from __future__ import annotations

from pcka.analysis.cka_table import CKATable
from pcka.analysis.gram_figure import grams_figure
from pcka.analysis.gram_pairs import GramPair, patch_grams, sample_grams
from pcka.analysis.grams import u_centered_gram
from pcka.analysis.layers import find_layers
from pcka.analysis.layerwise import MinibatchCKA, cka_matrix, layerwise_cka

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
