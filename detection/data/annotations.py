"""The result of annotation readers, a data set in COCO's format, and their shared helpers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pcka.engine.config import ConfigError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
ORIENTATION, TURNED = 274, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height


@dataclass
class Annotations:
    """Images with boxes, collected in COCO's format.

    Attributes:
        source: what they were read from, for messages.
        folder: folder that image names are relative to.
        classes: class names; category ids are 1, 2, … in their order.
    """

    source: str
    folder: Path
    classes: Sequence[str]
    images: list[dict[str, Any]] = field(default_factory=list)
    boxes: list[dict[str, Any]] = field(default_factory=list)

    def add_image(self, name: str, size: tuple[int, int]) -> None:
        """Add an image of the given width and height in pixels."""
        width, height = size
        entry = {"id": len(self.images) + 1, "file_name": name, "width": width, "height": height}
        self.images.append(entry)

    def add_box(self, index: int, box: tuple[float, ...], *, ignored: bool = False) -> None:
        """Add an object to the last image.

        Args:
            index: index of its class.
            box: x, y, width, height in pixels; x and y of the top left corner, from 0.
            ignored: exclude it from training and evaluation, like a crowd in COCO.
        """
        self.boxes.append(
            {
                "id": len(self.boxes) + 1,  # COCO's evaluation takes the id 0 as "no object"
                "image_id": len(self.images),
                "category_id": index + 1,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": int(ignored),
            }
        )

    @property
    def content(self) -> dict[str, Any]:
        """The content of a file in COCO's format."""
        categories = [{"id": index + 1, "name": name} for index, name in enumerate(self.classes)]
        return {"images": self.images, "annotations": self.boxes, "categories": categories}


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height in pixels as detectron2 reads the image, rotated by its EXIF tag.

    Raises:
        ConfigError: the image cannot be opened.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION) in TURNED
    except Exception as error:  # decoders raise many types for broken files
        raise ConfigError(f"{path}: the image cannot be opened: {error}") from error
    return (height, width) if turned else (width, height)


def finite(text: str | None, what: str) -> float:
    """Parse a finite number from a file.

    Raises:
        ConfigError: it is not a finite number; ``what`` names it and its location.
    """
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{what}: expected a finite number, got {text!r}")
    return number


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Return line numbers and content of the non-empty lines of a text file.

    Raises:
        ConfigError: the file is not UTF-8 text.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text (byte {error.start})") from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
