"""How alike the layers of two models are: CKA between layers, over a data set."""

from __future__ import annotations

from pcka.analysis.cka_table import CKATable
from pcka.analysis.grams import u_centered_gram
from pcka.analysis.layers import find_layers
from pcka.analysis.layerwise import MinibatchCKA, cka_matrix, layerwise_cka

__all__ = [
    "CKATable",
    "MinibatchCKA",
    "cka_matrix",
    "find_layers",
    "layerwise_cka",
    "u_centered_gram",
]
