"""Boxes in Pascal VOC format, with any classes: one XML file per image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from detection.data.annotations import (
    IMAGE_SUFFIXES,
    Annotations,
    finite,
    image_size,
    read_lines,
)
from pcka.engine.class_names import CLASSES_FILE, read_class_names
from pcka.engine.config import ConfigError

SIDES = ("xmin", "ymin", "xmax", "ymax")


def read_voc(key: str, root: Path, split: str) -> Annotations:
    """Return the images that ``ImageSets/Main/<split>.txt`` lists, and their boxes.

    An image is ``JPEGImages/<name>.jpg`` (or has another suffix); its boxes are in
    ``Annotations/<name>.xml``. Pixels count from 1 and both corners belong to the box, as in VOC
    and in detectron2: ``x = xmin - 1``, ``width = xmax - x``. ``difficult`` objects are excluded
    from training and evaluation. The classes are those in ``classes.txt``, one per line, or else
    all that occur in ``Annotations``, in alphabetical order.

    Args:
        key: configuration key, for messages.
        root: the folder that holds all of these.
        split: "train", "val", …

    Raises:
        ConfigError: a folder, file or image is missing, an XML file or a box is invalid, or
            ``classes.txt`` lacks a class.
    """
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    annotations, folder = root / "Annotations", root / "JPEGImages"
    for path in (annotations, folder):
        if not path.is_dir():
            raise ConfigError(f"{key}: expected the folder {path}, as in Pascal VOC")
    if not listing.is_file():
        raise ConfigError(
            f"{key}: expected the file {listing} with one image name per line, without suffix; "
            f"create it, or name another with {key.rpartition('.')[0]}.SPLIT"
        )
    pictures = {path.stem: path for path in sorted(folder.iterdir(), reverse=True)
                if path.suffix.lower() in IMAGE_SUFFIXES}  # fmt: skip
    found = Annotations(f"{root} ({split})", folder, _classes(root, annotations))
    first: dict[str, int] = {}
    for number, name in read_lines(listing):
        where = f"{listing}, line {number}"
        if first.setdefault(name, number) != number:
            raise ConfigError(f"{where}: {name!r} is already on line {first[name]}")
        if name not in pictures:
            raise ConfigError(
                f"{where}: there is no image {name!r} with a suffix ({', '.join(IMAGE_SUFFIXES)}) "
                f"in {folder}"
            )
        file = annotations / f"{name}.xml"
        if not file.is_file():
            raise ConfigError(
                f"{where}: there is no {file}; an image without objects needs one without <object>"
            )
        _add(found, pictures[name], file)
    if not found.images:
        raise ConfigError(f"{key}: {listing} lists no images")
    return found


def _classes(root: Path, annotations: Path) -> tuple[str, ...]:
    if (file := root / CLASSES_FILE).is_file():
        return read_class_names(file)
    files = sorted(annotations.glob("*.xml"))
    return tuple(sorted({_name(entry, where) for file in files for where, entry in _objects(file)}))


def _add(found: Annotations, picture: Path, file: Path) -> None:
    """Add an image and its objects."""
    found.add_image(picture.name, _size(_parsed(file)) or image_size(picture))
    for where, entry in _objects(file):
        if (name := _name(entry, where)) not in found.classes:
            raise ConfigError(
                f"{where}: {name!r} is not one of the {len(found.classes)} classes in "
                f"{CLASSES_FILE}; correct it, or add the class there"
            )
        left, top, right, bottom = (
            finite(entry.findtext(f"bndbox/{side}"), f"{where}: its <{side}> in <bndbox>")
            for side in SIDES
        )
        if right < left or bottom < top:
            raise ConfigError(f"{where}: its box ends before it begins: {left:g}, {top:g}, "
                              f"{right:g}, {bottom:g} ({', '.join(SIDES)})")  # fmt: skip
        box = (left - 1, top - 1, right - left + 1, bottom - top + 1)
        difficult = (entry.findtext("difficult") or "").strip() == "1"
        found.add_box(found.classes.index(name), box, ignored=difficult)


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """Return width and height, or None if the file does not state them."""
    stated = [(tree.findtext(f"size/{side}") or "").strip() for side in ("width", "height")]
    if not all(text.isdecimal() and int(text) for text in stated):
        return None
    width, height = map(int, stated)
    return width, height


def _objects(file: Path) -> Iterator[tuple[str, ElementTree.Element]]:
    """Yield the objects of a file, each with its name for messages."""
    for number, entry in enumerate(_parsed(file).findall("object"), 1):
        yield f"{file}: object {number}", entry


def _name(entry: ElementTree.Element, where: str) -> str:
    if not (name := (entry.findtext("name") or "").strip()):
        raise ConfigError(f"{where}: has no <name>")
    return name


def _parsed(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as XML: {error}") from error
