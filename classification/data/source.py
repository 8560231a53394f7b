"""Data sets by name, not yet opened: their labels are known, and their images can be read."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from classification.data.image_set import ImageSet
from classification.data.resident import ResidentSet
from pcka.engine.config import ConfigError, near_names


@dataclass(frozen=True)
class Source:
    """A data set whose labels are known and whose images can be read.

    Attributes:
        labels: class index of each image, (N,) int64.
        classes: class names, by index.
        read: image indices (M,) -> their pixels (M, 3, S, S), uint8, RGB.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[np.ndarray], Tensor]

    def open(self, data: CfgNode, chosen: np.ndarray, *, evaluated: bool) -> ImageSet:
        """Return the chosen images as a set that yields batches.

        Args:
            data: the section ``DATA``.
            chosen: image indices, (M,).
            evaluated: the set is for evaluation, not for training.

        Raises:
            ConfigError: keys that apply only to image files.
        """
        for key, unset in (("STREAM", False), ("RESIZE", 0)):
            if data[key]:
                raise ConfigError(
                    f"DATA.{key}: is for image files, DATA.NAME is {data.NAME!r}, which has none; "
                    f"set it to {unset}"
                )
        labels = torch.from_numpy(self.labels[chosen])
        return ResidentSet(self.read(chosen), labels, self.classes)


MakeSource = Callable[[CfgNode, str], Source]
F = TypeVar("F", bound=MakeSource)

# Name -> module of this package that registers it; imported on first use.
BUILT_IN = {
    "cifar10": "cifar",
    "cifar100": "cifar",
    "digits": "digits",
    "folder": "folder",
    "huggingface": "huggingface",
    "table": "table",
    "webdataset": "shards",
}
# Keys of DATA that only some of them read.
READ_BY = {
    "TRAIN_PART": ("huggingface", "table", "webdataset"),
    "TEST_PART": ("huggingface", "table", "webdataset"),
    "IMAGE_COLUMN": ("huggingface", "table"),
    "LABEL_COLUMN": ("huggingface", "table", "webdataset"),
}
_SOURCES: dict[str, MakeSource] = {}


def register(name: str) -> Callable[[F], F]:
    """Decorator: make a data set available as ``DATA.NAME``.

    The decorated function takes the section ``DATA`` and a split, "train" or "test", and returns
    the :class:`Source` of that split.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(make: F) -> F:
        _import_built_in(name)
        if name in _SOURCES:
            raise ValueError(f"name: a data set {name!r} is already registered; choose another")
        _SOURCES[name] = make
        return make

    return decorate


def dataset_names() -> list[str]:
    """Return the valid values of ``DATA.NAME``, sorted."""
    return sorted({*BUILT_IN, *_SOURCES})


def check_name(name: str) -> None:
    """Check that a ``DATA.NAME`` is registered.

    Raises:
        ConfigError: it is not; the message suggests close matches.
    """
    if name not in dataset_names():
        near = near_names(name, dataset_names())
        raise ConfigError(f"DATA.NAME: unknown data set {name!r}; {near}")


def make_source(data: CfgNode, split: str) -> Source:
    """Return the "train" or "test" part of the data set ``DATA.NAME``.

    Raises:
        ConfigError: an unknown name (the message suggests close matches), or settings or data that
            the data set rejects.
    """
    check_name(data.NAME)
    _refuse_unread(data)
    _import_built_in(data.NAME)
    return _SOURCES[data.NAME](data, split)


def _refuse_unread(data: CfgNode) -> None:
    for key, names in READ_BY.items():
        if data[key] and data.NAME in BUILT_IN and data.NAME not in names:
            raise ConfigError(
                f"DATA.{key}: is for {', '.join(names)}, DATA.NAME is {data.NAME!r}; leave it empty"
            )


def _import_built_in(name: str) -> None:
    if name in BUILT_IN:
        importlib.import_module(f"{__package__}.{BUILT_IN[name]}")
