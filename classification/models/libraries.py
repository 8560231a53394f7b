"""Models of other libraries, and your own: `timm/...`, `hf/...`, `package.module:factory`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from classification.models.logits import give_logits
from pcka.engine.config import ConfigError, import_modules
from pcka.extras import optional_package

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def constructor_of(name: str) -> Callable[..., nn.Module]:
    """Return the model's constructor: number of classes and keywords -> module.

    Raises:
        ValueError: no such model (the message suggests close matches).
        ImportError: the library is not installed; the message says how to install it.
    """
    library, _, rest = name.partition("/")
    if library == "timm":
        return partial(_of_timm, _known_to_timm(rest))
    if library == "hf":
        return partial(_of_transformers, rest)
    return partial(_of_own, name, _imported(name))


def _known_to_timm(name: str) -> str:
    timm = optional_package("timm", "timm")
    base = name.partition(".")[0]  # a tag of the pretrained weights may follow
    if ":" not in name and not timm.is_model(base):
        known = timm.list_models()
        near = [one for one in known if one.startswith(base)][:5] or get_close_matches(base, known)
        named = ", ".join(f"timm/{one}" for one in near)
        hint = f"did you mean {named}?" if near else "timm.list_models() lists them"
        raise ValueError(f"name: timm {timm.__version__} has no model {name!r}; {hint}")
    return name


def _of_timm(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """Return a timm model; `pretrained=True` loads timm's weights for it."""
    timm = optional_package("timm", "timm")
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, **kwargs)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"kwargs: timm cannot make {name!r} with {kwargs}: {error}") from error
    return model


def _of_transformers(
    name: str,
    num_classes: int,
    *,
    pretrained: bool | None = None,
    ignore_mismatched_sizes: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Return an image classifier of transformers from its configuration.

    Args:
        name: a folder with `config.json`, or a name on the Hub.
        num_classes: number of logits.
        pretrained: whether to load the weights; None: if the folder has them.
        ignore_mismatched_sizes: reinitialise the classifier if the weights are for other classes.
        kwargs: keywords of the configuration.
    """
    transformers = optional_package("transformers", "hf")
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"name: the folder {name!r} holds no config.json of transformers")
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise ValueError(f"name: there is no folder {name!r}")
    source = str(folder) if folder.is_dir() else name
    classifier = transformers.AutoModelForImageClassification
    own = folder_has_weights(name) if pretrained is None else pretrained
    try:
        config = transformers.AutoConfig.from_pretrained(source, **kwargs)
        if config.num_labels != num_classes:
            config.num_labels = num_classes
        if not own:
            return give_logits(classifier.from_config(config))
        model = classifier.from_pretrained(
            source, config=config, ignore_mismatched_sizes=ignore_mismatched_sizes
        )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        way_out = (
            "; in KWARGS, pretrained: false ignores weights of other classes, "
            "ignore_mismatched_sizes: true only their classifier"
            if own
            else ""
        )
        raise ValueError(f"name: transformers cannot make {name!r}: {error}{way_out}") from error
    return give_logits(model)


def folder_has_weights(name: str) -> bool:
    """Whether a transformers folder holds weights as well as the configuration."""
    return any(any(Path(name).expanduser().glob(pattern)) for pattern in WEIGHT_FILES)


def _imported(name: str) -> Callable[..., nn.Module]:
    path, _, attribute = name.partition(":")
    try:
        import_modules([path], "name")
    except ConfigError as error:
        raise ValueError(str(error)) from error
    module = importlib.import_module(path)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value)]
        near = get_close_matches(attribute, known)
        hint = f"did you mean {', '.join(near)}?" if near else f"available: {', '.join(known)}"
        raise ValueError(f"name: {path!r} has no function or class {attribute!r}; {hint}")
    return factory


def _of_own(
    name: str, factory: Callable[..., nn.Module], num_classes: int, **kwargs: Any
) -> nn.Module:
    if _takes(factory, "num_classes"):
        kwargs = {"num_classes": num_classes, **kwargs}
    model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise ValueError(f"name: {name} gives {type(model).__name__}, expected a torch.nn.Module")
    return give_logits(model)


def _takes(function: Callable[..., Any], keyword: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # raised for some builtins
        return True
    kinds = [parameter.kind for parameter in parameters.values()]
    return keyword in parameters or inspect.Parameter.VAR_KEYWORD in kinds
