"""Models by name: built-in models, those of other libraries, and your own.

A family is imported when one of its names is first requested.
"""

from __future__ import annotations

from classification.models.registry import Classifier, create_model, model_names, register
from classification.models.weights import (
    classes_in,
    has_own_weights,
    load_classifier,
    model_of,
    named_model,
    settings_of,
    without_weights,
)

__all__ = [
    "Classifier",
    "classes_in",
    "create_model",
    "has_own_weights",
    "load_classifier",
    "model_names",
    "model_of",
    "named_model",
    "register",
    "settings_of",
    "without_weights",
]
