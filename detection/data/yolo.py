"""Boxes in YOLO format: one text file per image, in a parallel folder ``labels``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detection.data.annotations import (
    IMAGE_SUFFIXES,
    Annotations,
    finite,
    image_size,
    read_lines,
)
from pcka.engine.class_names import CLASSES_FILE, read_class_names
from pcka.engine.config import ConfigError, read_tree

logger = logging.getLogger("detectron2.pcka")

YAML_FILE = "data.yaml"
FIELDS = ("class", "center x", "center y", "width", "height")
MOST = 1.01  # fraction of the image's side: rounded values may exceed 1 slightly


def read_yolo(key: str, root: Path, split: str) -> Annotations:
    """Return the images of a split, and their boxes.

    The split's entry in ``data.yaml`` is a folder of images, searched recursively, a text file that
    lists them, or a list of these, relative to the entry ``path`` or to the YAML file; ``names``
    holds the classes. Without ``data.yaml``, the images are in ``images/<split>`` and
    ``classes.txt`` names the classes, one per line. The boxes of ``…/images/a/b.jpg`` are in
    ``…/labels/a/b.txt``, one per line: class index from 0, then center x, center y, width and
    height as fractions of the image's sides. An image without such a file has no objects.

    Args:
        key: configuration key, for messages.
        root: the folder, or the path of its YAML file.
        split: "train", "val", …

    Raises:
        ConfigError: a folder or file is missing, a split has no images or no label files, or a
            line is not a box of one of the classes.
    """
    file = root / YAML_FILE if root.is_dir() else root
    if file.is_file():
        folder, places, classes = _described(key, file, split)
    else:
        folder, places, classes = _plain(key, root, split)
    images = sorted(image for place in places for image in _images(key, place))
    if not images:
        raise ConfigError(
            f"{key}: there is no image ({', '.join(IMAGE_SUFFIXES)}) in "
            f"{', '.join(map(str, places))}"
        )
    found = Annotations(f"{root} ({split})", folder, classes)
    missing = []
    for image in images:
        name = image.relative_to(folder) if image.is_relative_to(folder) else image
        size = image_size(image)
        found.add_image(str(name), size)
        labels = _labels_of(image)
        if labels.is_file():
            _add_boxes(found, labels, size)
        else:
            missing.append(labels)
    if len(missing) == len(images):
        raise ConfigError(
            f"{key}: none of the {len(images)} images has a label file; that of {images[0]} "
            f"would be {missing[0]}"
        )
    if missing:
        logger.warning(
            "%s: %d of the %d images have no label file and count as without objects (first: %s)",
            key, len(missing), len(images), missing[0],
        )  # fmt: skip
    return found


def _plain(key: str, root: Path, split: str) -> tuple[Path, list[Path], tuple[str, ...]]:
    """Return folder, image locations and classes in the absence of a YAML file."""
    if not (root / CLASSES_FILE).is_file():
        raise ConfigError(
            f"{key}: expected {root / YAML_FILE}, or {root / CLASSES_FILE} with one class name "
            f"per line next to images/{split} and labels/{split}"
        )
    return root, [root / "images" / split], read_class_names(root / CLASSES_FILE)


def _described(key: str, file: Path, split: str) -> tuple[Path, list[Path], tuple[str, ...]]:
    content = read_tree(file)
    places = content.get(split)
    if isinstance(places, str):
        places = [places]
    if not places or not isinstance(places, list) or not all(isinstance(p, str) for p in places):
        raise ConfigError(
            f"{key}: {file}: expected a folder or a list of folders as {split!r}, got {places!r}; "
            f"name another split with {key.rpartition('.')[0]}.SPLIT"
        )
    folder = file.parent / str(content.get("path") or "")
    return folder, [_existing(folder, place) for place in places], _names(file, content)


def _existing(folder: Path, place: str) -> Path:
    path = folder / place
    if not path.exists() and place.startswith("../"):  # Roboflow's paths have one level too many
        return folder / place.removeprefix("../")
    return path


def _names(file: Path, content: dict[str, Any]) -> tuple[str, ...]:
    names, count = content.get("names"), content.get("nc")
    if isinstance(names, dict) and names.keys() == set(range(len(names))):
        names = [names[index] for index in range(len(names))]
    if not names or not isinstance(names, list) or len(set(map(str, names))) < len(names):
        raise ConfigError(
            f"{file}: expected the classes as 'names', a list or a mapping from 0, 1, …, without "
            f"duplicates, got {names!r}"
        )
    if count not in (None, len(names)):
        raise ConfigError(f"{file}: has {len(names)} names, but 'nc' is {count!r}")
    return tuple(map(str, names))


def _images(key: str, place: Path) -> Iterator[Path]:
    """Yield the images of a folder, or those that a text file lists."""
    if place.is_dir():
        yield from (path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        return
    if place.suffix != ".txt" or not place.is_file():
        raise ConfigError(f"{key}: there is no image folder {str(place)!r}, nor such a list")
    for number, line in read_lines(place):
        image = place.parent / line
        if not image.is_file():
            raise ConfigError(f"{place}, line {number}: there is no image {str(image)!r}")
        yield image


def _labels_of(image: Path) -> Path:
    """Return the file of an image's boxes: ``labels`` replaces the last ``images``."""
    parts = list(image.parts)
    for index in reversed(range(len(parts) - 1)):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _add_boxes(found: Annotations, file: Path, size: tuple[int, int]) -> None:
    for number, line in read_lines(file):
        where, words = f"{file}, line {number}", line.split()
        if len(words) != len(FIELDS):
            raise ConfigError(
                f"{where}: expected {len(FIELDS)} numbers ({', '.join(FIELDS)}), got {len(words)}"
            )
        kind, *box = (finite(word, f"{where}: {field}") for word, field in zip(words, FIELDS))
        if kind not in range(len(found.classes)):
            raise ConfigError(
                f"{where}: the class {words[0]} is not one of the {len(found.classes)}, counted "
                "from 0"
            )
        if not all(0 <= part <= MOST for part in box):
            raise ConfigError(
                f"{where}: expected fractions of the image's sides, from 0 to 1, got {line!r}; "
                "divide pixels by the image's width and height"
            )
        found.add_box(int(kind), _in_pixels(box, size))


def _in_pixels(box: list[float], size: tuple[int, int]) -> tuple[float, ...]:
    (x, y, width, height), (across, down) = box, size
    return (x - width / 2) * across, (y - height / 2) * down, width * across, height * down
