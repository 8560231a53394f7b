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
    """The type that :func:`create_model` returns, for type checkers; models have their own classes.

    All attributes are paths for `pcka.taps.FeatureTap` (`<path>:input` is the input of a module).
    Attributes that a model does not define are empty, `()` or `''`: its stages are then found by a
    dry run (`stage_search`), or given by `DISTILL.TAPS`.

    Attributes:
        stage_names: the stage outputs after the activation, stem first. If a family's stages end
            without an activation (WRN, MobileNetV2), their outputs.
        preactivation_names: the same stages before the activation, one each. In general
            `relu(preactivation)` is the stage; each family documents its exceptions.
        preactivation_norms: modules, the batch norms that produce these features or, where a norm's
            output and a shortcut are added, their branch; '' if no norm produces all channels.
        pooled_name: the classifier's input, `(B, D)`.
        classifier_name: a module, the last `nn.Linear`.
    """

    stage_names: tuple[str, ...] = ()
    preactivation_names: tuple[str, ...] = ()
    preactivation_norms: tuple[str, ...] = ()
    pooled_name: str = ""
    classifier_name: str = ""


# Module of this package -> prefixes of the names that it registers; imported on first use.
FAMILIES = {
    "mobilenet": ("MobileNet",),
    "resnet_cifar": ("resnet", "ResNet"),
    "shufflenet": ("Shuffle",),
    "torchvision_zoo": ("torchvision/",),
    "vgg": ("vgg",),
    "wrn": ("wrn",),
}
# Prefixes of other libraries' models, which are not registered one by one.
LIBRARIES = ("timm/", "hf/")
_CONSTRUCTORS: dict[str, Constructor] = {}


def register(name: str) -> Callable[[C], C]:
    """Decorator: make `constructor(num_classes)` available as `create_model(name, num_classes)`.

    The model that it returns must output logits; if it has the attributes of :class:`Classifier`,
    losses find its stages through them.

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
    """Return the registered names, sorted; `timm/`, `hf/` and your own models are not listed."""
    for family in FAMILIES:
        importlib.import_module(f"{__package__}.{family}")
    return sorted(_CONSTRUCTORS)


def create_model(name: str, num_classes: int, **kwargs: Any) -> Classifier:
    """Build a freshly initialised model by name.

    Args:
        name: one of `model_names()`, of which `torchvision/<name>` are torchvision's models for
            ImageNet and the others are built in; `timm/<name>`; `hf/<folder or name>`, an image
            classifier of transformers; or `package.module:factory` for a custom model, which is
            called with `num_classes` if it takes it. Names are case-sensitive.
        num_classes: number of logits.
        kwargs: keywords of the model's constructor.

    Returns:
        A module from images `(B, 3, H, W)` to logits `(B, num_classes)`.

    Raises:
        ValueError: an unknown name (the message suggests close matches), `num_classes` below 1, or
            keywords that the constructor rejects.
        ImportError: the model's library is not installed.
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
    """Return the constructor, which is called with the number of classes."""
    _import_family(name)
    if name in _CONSTRUCTORS:
        return _CONSTRUCTORS[name]
    if name.startswith(LIBRARIES) or ":" in name:
        from classification.models.libraries import constructor_of  # few runs name one

        return constructor_of(name)
    near = _nearest(name)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(model_names())}"
    raise ValueError(f"name: there is no model {name!r}; {hint}")


def _import_family(name: str) -> None:
    """Import the module that registers a name, identified by the prefix."""
    for module, beginnings in FAMILIES.items():
        if name.startswith(beginnings):
            importlib.import_module(f"{__package__}.{module}")


def _nearest(name: str) -> list[str]:
    """Return similar names, ignoring case and collection (the part before the `/`)."""
    by_base: dict[str, list[str]] = {}
    for known in model_names():
        by_base.setdefault(_base(known), []).append(known)
    return [known for match in get_close_matches(_base(name), by_base) for known in by_base[match]]


def _base(name: str) -> str:
    return name.rpartition("/")[2].casefold()
