"""The community's model zoo, and torchvision's, by name.

Each family is imported when one of its names is first asked for.
"""

from __future__ import annotations

from classification.models.registry import Classifier, create_model, model_names, register
from classification.models.weights import load_classifier, named_model

__all__ = [
    "Classifier",
    "create_model",
    "load_classifier",
    "model_names",
    "named_model",
    "register",
]
