"""Model names and their constructors."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import cast

from torch import nn


class Classifier(nn.Module):
    """What :func:`create_model` gives, for type checkers: the models are of classes of their own.

    All attributes are paths as `pcka.taps.FeatureTap` takes them (`<path>:input` is the input of a
    module). A model whose stages are not known has empty tuples; losses on its stages need paths
    given by hand. One without a linear layer has '' for the last two.

    Attributes:
        stage_names: the stage outputs after the activation, stem first. Where a family's stages
            end without one (WRN, MobileNetV2), their outputs as they are.
        preactivation_names: the same stages before the activation, in the same number. In general
            `relu(preactivation)` is the stage; each family says where it is not.
        preactivation_norms: modules, the batch norms that give these features or, where a norm's
            output and a shortcut are added, their branch; '' where there is none for all channels.
        pooled_name: what the classifier gets, `(B, D)`.
        classifier_name: a module, the last `nn.Linear`.
    """

    stage_names: tuple[str, ...]
    preactivation_names: tuple[str, ...]
    preactivation_norms: tuple[str, ...]
    pooled_name: str
    classifier_name: str


_CONSTRUCTORS: dict[str, Callable[[int], nn.Module]] = {}


def register(name: str, constructor: Callable[[int], nn.Module]) -> None:
    """Make `constructor(num_classes)` available as `create_model(name, num_classes)`.

    The model that it returns gives logits, and has the attributes of :class:`Classifier`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _CONSTRUCTORS:
        raise ValueError(f"name: expected a name not registered yet, got {name!r}")
    _CONSTRUCTORS[name] = constructor


def model_names() -> list[str]:
    """Return the names that `create_model` knows, sorted."""
    return sorted(_CONSTRUCTORS)


def create_model(name: str, num_classes: int) -> Classifier:
    """Build a freshly initialised model by its community name.

    Args:
        name: one of `model_names()`; upper and lower case count. `torchvision/<name>` are
            torchvision's models for ImageNet, the others the community's.
        num_classes: number of logits.

    Returns:
        A module from images `(B, 3, H, W)` to logits `(B, num_classes)`.

    Raises:
        ValueError: unknown name (the message lists the nearest ones) or `num_classes` below 1.
    """
    if name not in _CONSTRUCTORS:
        near = _nearest(name)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(model_names())}"
        raise ValueError(f"name: expected one of model_names(), got {name!r}; {hint}")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    return cast(Classifier, _CONSTRUCTORS[name](num_classes))


def _nearest(name: str) -> list[str]:
    """Names like this one, whatever their case and their collection (what is before the `/`)."""
    by_base: dict[str, list[str]] = {}
    for known in model_names():
        by_base.setdefault(_base(known), []).append(known)
    return [known for match in get_close_matches(_base(name), by_base) for known in by_base[match]]


def _base(name: str) -> str:
    return name.rpartition("/")[2].casefold()
