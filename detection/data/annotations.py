"""What readers of annotations make: a data set as COCO's files describe it, and what they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pcka.engine.config import ConfigError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
ORIENTATION, TURNED = 274, (5, 6, 7, 8)  # the EXIF tag, and its values that exchange the sides


@dataclass
class Annotations:
    """Images with boxes, collected in COCO's format.

    Attributes:
        source: what they are read from, for messages.
        folder: that the images' names are relative to.
        classes: names; category ids are 1, 2, … in their order.
    """

    source: str
    folder: Path
    classes: Sequence[str]
    images: list[dict[str, Any]] = field(default_factory=list)
    boxes: list[dict[str, Any]] = field(default_factory=list)

    def add_image(self, name: str, size: tuple[int, int]) -> None:
        """Add an image of a width and height, pixels."""
        width, height = size
        entry = {"id": len(self.images) + 1, "file_name": name, "width": width, "height": height}
        self.images.append(entry)

    def add_box(self, index: int, box: tuple[float, ...], *, ignored: bool = False) -> None:
        """Add an object of the last image.

        Args:
            index: of its class.
            box: x, y, width, height, pixels; x and y from 0, at the upper left corner.
            ignored: it is neither learnt nor counted, as a crowd of COCO's.
        """
        self.boxes.append(
            {
                "id": len(self.boxes) + 1,  # COCO's evaluation takes an object 0 for none
                "image_id": len(self.images),
                "category_id": index + 1,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": int(ignored),
            }
        )

    @property
    def content(self) -> dict[str, Any]:
        """What a file in COCO's format says."""
        categories = [{"id": index + 1, "name": name} for index, name in enumerate(self.classes)]
        return {"images": self.images, "annotations": self.boxes, "categories": categories}


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height in pixels as detectron2 reads the image: turned as its EXIF says.

    Raises:
        ConfigError: it cannot be opened.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION) in TURNED
    except Exception as error:  # what a decoder meets in a broken file is of many types
        raise ConfigError(f"{path}: the image cannot be opened: {error}") from error
    return (height, width) if turned else (width, height)


def finite(text: str | None, what: str) -> float:
    """Return a number that stands in a file.

    Raises:
        ConfigError: it is none; ``what`` says where it stands, and which it is.
    """
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{what}: expected a finite number, got {text!r}")
    return number


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Return number and content of the lines of a text file that are not empty.

    Raises:
        ConfigError: it is no text in UTF-8.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text (byte {error.start})") from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
