"""Looking at what a student took over: layer-wise CKA, and curves (in ``plots``)."""

from __future__ import annotations

from pcka.analysis.layerwise import LayerwiseCKA, layerwise_cka

__all__ = ["LayerwiseCKA", "layerwise_cka"]
