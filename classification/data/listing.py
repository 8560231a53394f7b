"""Shared by data sets that list their images: the names of parts, and class indices."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from fvcore.common.config import CfgNode

from pcka.engine.class_names import CLASSES_FILE, read_class_names
from pcka.engine.config import ConfigError

PARTS = {"train": ("train",), "test": ("test", "val", "validation")}
PART_KEYS = {"train": "TRAIN_PART", "test": "TEST_PART"}
NUMBER = re.compile(r"-?\d+")


def part_names(data: CfgNode, split: str) -> tuple[str, ...]:
    """Return the names that a part may have; the first one found is used.

    Args:
        data: TRAIN_PART and TEST_PART; "" stands for the usual names.
        split: "train" or "test".
    """
    given = data[PART_KEYS[split]]
    return (given,) if given else PARTS[split]


def files_like(root: Path, pattern: str) -> list[str]:
    """Return the files in ``root`` whose path matches a shell pattern, sorted."""
    found = glob.glob(os.path.join(glob.escape(str(root)), pattern))
    return sorted(path for path in found if os.path.isfile(path))


def missing_part(data: CfgNode, split: str, expected: str) -> ConfigError:
    """Return the error for a missing part.

    Args:
        data: the section ``DATA``.
        split: "train" or "test".
        expected: what was looked for.
    """
    way_out = f"DATA.{PART_KEYS[split]} names another"
    if split == "test":
        way_out += ", and DATA.HOLDOUT evaluates on training images"
    return ConfigError(f"DATA.ROOT: expected {expected}, found none; {way_out}")


def class_indices(
    labels: Sequence[object], root: Path, place: Callable[[int], str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the class index of each image, (N,) int64, and the class names by index.

    A file ``ROOT/classes.txt`` names the classes, one per line; a label is a name or an index.
    Without it the labels are the names, in numerical order if all of them are integers, otherwise
    in alphabetical order.

    Args:
        labels: strings or integers, as they appear in the data, (N,).
        root: the folder ``DATA.ROOT``.
        place: index of an image -> location of its label, for messages.

    Raises:
        ConfigError: an image without a label, or with one that is not a class.
    """
    names = [_name(label, place, index) for index, label in enumerate(labels)]
    file = root / CLASSES_FILE
    if file.is_file():
        classes = read_class_names(file)
        indices = {name: index for index, name in enumerate(classes)}
        by_number = {str(index): index for index in range(len(classes))}
        known = by_number | indices
    else:
        classes = _sorted(set(names))
        known = {name: index for index, name in enumerate(classes)}
    for index, name in enumerate(names):
        if name not in known:
            raise ConfigError(
                f"{place(index)}: the label {name!r} is not one of the {len(classes)} classes of "
                f"{file}, by name or index from 0; correct it, or add the class there"
            )
    return np.array([known[name] for name in names], dtype=np.int64), classes


def _name(label: object, place: Callable[[int], str], index: int) -> str:
    if isinstance(label, str | int) and not isinstance(label, bool):
        if name := str(label).strip():
            return name
    elif label is not None:
        raise ConfigError(
            f"{place(index)}: the label {label!r} is neither text nor an integer; set "
            "DATA.LABEL_COLUMN to the right column, or write the labels as text"
        )
    raise ConfigError(f"{place(index)}: the image has no label; add one, or remove the image")


def _sorted(names: set[str]) -> tuple[str, ...]:
    if all(NUMBER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
