"""Model names and their constructors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from difflib import get_close_matches
from typing import TypeVar, cast

from torch import nn

Constructor = Callable[[int], nn.Module]
C = TypeVar("C", bound=Constructor)


class Classifier(nn.Module):
    """What :func:`create_model` gives, for type checkers: the models are of classes of their own.

    All attributes are paths as `pcka.taps.FeatureTap` takes them (`<path>:input` is the input of a
    module). What a model does not have itself is empty, `()` or `''`: losses on its stages need
    paths given by hand.

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

    stage_names: tuple[str, ...] = ()
    preactivation_names: tuple[str, ...] = ()
    preactivation_norms: tuple[str, ...] = ()
    pooled_name: str = ""
    classifier_name: str = ""


# Module of this package -> beginnings of the names that it registers, imported when one is named.
FAMILIES = {
    "mobilenet": ("MobileNet",),
    "resnet_cifar": ("resnet", "ResNet"),
    "shufflenet": ("Shuffle",),
    "torchvision_zoo": ("torchvision/",),
    "vgg": ("vgg",),
    "wrn": ("wrn",),
}
_CONSTRUCTORS: dict[str, Constructor] = {}


def register(name: str) -> Callable[[C], C]:
    """Decorator: make `constructor(num_classes)` available as `create_model(name, num_classes)`.

    The model that it returns gives logits; where it has the attributes of :class:`Classifier`,
    losses find its stages by them.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(constructor: C) -> C:
        _import_family(name)
        if name in _CONSTRUCTORS:
            raise ValueError(f"name: expected a name not registered yet, got {name!r}")
        _CONSTRUCTORS[name] = constructor
        return constructor

    return decorate


def model_names() -> list[str]:
    """Return the names that `create_model` knows, sorted."""
    for family in FAMILIES:
        importlib.import_module(f"{__package__}.{family}")
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
    _import_family(name)
    if name not in _CONSTRUCTORS:
        near = _nearest(name)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(model_names())}"
        raise ValueError(f"name: expected one of model_names(), got {name!r}; {hint}")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    model = _CONSTRUCTORS[name](num_classes)
    for attribute in Classifier.__annotations__:
        if not hasattr(model, attribute):
            setattr(model, attribute, getattr(Classifier, attribute))
    return cast(Classifier, model)


def _import_family(name: str) -> None:
    """Import the module that a name belongs to by its beginning."""
    for module, beginnings in FAMILIES.items():
        if name.startswith(beginnings):
            importlib.import_module(f"{__package__}.{module}")


def _nearest(name: str) -> list[str]:
    """Names like this one, whatever their case and their collection (what is before the `/`)."""
    by_base: dict[str, list[str]] = {}
    for known in model_names():
        by_base.setdefault(_base(known), []).append(known)
    return [known for match in get_close_matches(_base(name), by_base) for known in by_base[match]]


def _base(name: str) -> str:
    return name.rpartition("/")[2].casefold()
