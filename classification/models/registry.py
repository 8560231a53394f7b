"""Model names and their constructors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar, cast

from torch import nn

Constructor = Callable[..., nn.Module]
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
# Beginnings of the names of other libraries' models, which are not registered one by one.
LIBRARIES = ("timm/", "hf/")
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
    """Return the names that are registered, sorted; `timm/`, `hf/` and own ones are beside them."""
    for family in FAMILIES:
        importlib.import_module(f"{__package__}.{family}")
    return sorted(_CONSTRUCTORS)


def create_model(name: str, num_classes: int, **kwargs: Any) -> Classifier:
    """Build a freshly initialised model by its name.

    Args:
        name: one of `model_names()`, of which `torchvision/<name>` are torchvision's models for
            ImageNet and the others the community's; `timm/<name>`; `hf/<folder or name>`, an image
            classifier of transformers; or `package.module:factory` for one of your own, which is
            called with `num_classes` if it takes it. Upper and lower case count.
        num_classes: number of logits.
        kwargs: keywords of the model's constructor.

    Returns:
        A module from images `(B, 3, H, W)` to logits `(B, num_classes)`.

    Raises:
        ValueError: an unknown name (the message lists the nearest ones), `num_classes` below 1, or
            keywords that the constructor refuses.
        ImportError: the library that has the model is not installed.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    constructor = _constructor(name)
    try:
        model = constructor(num_classes, **kwargs)
    except (TypeError, AssertionError) as error:
        if not kwargs:
            raise
        raise ValueError(f"kwargs: {name} cannot be made with {kwargs}: {error}") from error
    for attribute in Classifier.__annotations__:
        if not hasattr(model, attribute):
            setattr(model, attribute, getattr(Classifier, attribute))
    return cast(Classifier, model)


def _constructor(name: str) -> Constructor:
    """What is called with the number of classes."""
    _import_family(name)
    if name in _CONSTRUCTORS:
        return _CONSTRUCTORS[name]
    if name.startswith(LIBRARIES) or ":" in name:
        from classification.models.libraries import constructor_of  # few runs name one

        return constructor_of(name)
    near = _nearest(name)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(model_names())}"
    raise ValueError(f"name: expected one of model_names(), got {name!r}; {hint}")


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
