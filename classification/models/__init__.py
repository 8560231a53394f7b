"""The community's model zoo by name; each family registers itself when imported here."""

from __future__ import annotations

from classification.models import mobilenet, resnet_cifar, shufflenet, vgg, wrn  # noqa: F401
from classification.models.registry import create_model, model_names

__all__ = ["create_model", "model_names"]
