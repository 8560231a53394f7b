"""Semantic segmentation data: label images, checked, and custom folders of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from detection.data.annotations import IMAGE_SUFFIXES, image_size
from detection.data.coco_file import DamagedFileError
from pcka.engine.class_names import read_class_names
from pcka.engine.config import ConfigError

LABEL_SUFFIX = ".png"
TRIED_LABELS = 16  # label images of a training set checked here; the loader checks all it reads
LARGEST = 255  # largest pixel value that detectron2 reads from label images

Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class Labels:
    """Reads label images, and refuses invalid ones.

    Args:
        classes: number of classes; pixels hold values from 0 to ``classes - 1``.
        ignored: value of pixels that are ignored.
    """

    classes: int
    ignored: int

    @classmethod
    def of(cls, cfg: CfgNode) -> Labels:
        """Return the labels of the student that a configuration describes."""
        keys = cfg.MODEL.SEM_SEG_HEAD
        return cls(keys.NUM_CLASSES, keys.IGNORE_VALUE)

    def read(self, path: str | Path) -> np.ndarray:
        """Return the class of each pixel, ``(H, W)`` uint8, of a greyscale or palette image.

        Raises:
            DamagedFileError: it cannot be opened, holds colours, or classes that the model lacks.
        """
        try:
            with Image.open(path) as image:
                values, mode = np.asarray(image), image.mode
        except Exception as error:  # decoders raise many types for broken files
            raise DamagedFileError(f"{path}: the label image cannot be opened: {error}") from error
        if values.ndim != 2:
            raise DamagedFileError(
                f"{path}: expected one class per pixel, in a grey or palette PNG, got {mode} "
                "colours"
            )
        found = np.unique(values).tolist()
        if odd := [v for v in found if v != self.ignored and not 0 <= v < self.classes]:
            raise DamagedFileError(
                f"{path}: holds the value(s) {', '.join(map(str, odd[:5]))}; expected classes "
                f"from 0 to {self.classes - 1}, or {self.ignored} for none. Correct it, or "
                "MODEL.SEM_SEG_HEAD.NUM_CLASSES and IGNORE_VALUE"
            )
        if found[-1] > LARGEST:
            raise DamagedFileError(f"{path}: expected values up to {LARGEST}, got {found[-1]}")
        return values.astype(np.uint8)


def read_folders(
    key: str, images: str | Path, truths: str | Path, labels: Labels, *, evaluated: bool
) -> Entries:
    """Return detectron2's entries for a folder of images and a folder of label images.

    The label image of ``a/b.jpg`` is ``a/b.png`` in the label folder.

    Args:
        key: configuration key, e.g. ``DATASETS.SEMSEG_TRAIN``, for messages.
        images: folder of the images.
        truths: folder of the label images.
        labels: the labels that the model accepts.
        evaluated: check every label image now, since the evaluation reads them all; else a few.

    Raises:
        DamagedFileError: a folder is missing or empty, an image has no labels or labels of another
            size, or labels are invalid.
    """
    for leaf, folder in (("IMAGES", images), ("LABELS", truths)):
        if not str(folder) or not Path(folder).expanduser().is_dir():
            raise DamagedFileError(f"{key}.{leaf}: there is no folder {str(folder)!r}")
    images, truths = Path(images).expanduser(), Path(truths).expanduser()
    found = sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        listed = ", ".join(IMAGE_SUFFIXES)
        raise DamagedFileError(f"{key}.IMAGES: no image ({listed}) in {str(images)!r}")
    pairs = [(p, truths / p.relative_to(images).with_suffix(LABEL_SUFFIX)) for p in found]
    if missing := [truth for _, truth in pairs if not truth.is_file()]:
        raise DamagedFileError(
            f"{key}.LABELS: {len(missing)} of {len(pairs)} images have no label image "
            f"(first: {str(missing[0])!r})"
        )
    entries = [_entry(image, truth) for image, truth in pairs]
    for _, truth in pairs[:: 1 if evaluated else max(1, len(pairs) // TRIED_LABELS)]:
        labels.read(truth)
    return entries


def _entry(image: Path, truth: Path) -> dict[str, Any]:
    size = image_size(image)
    if (other := image_size(truth)) != size:
        raise DamagedFileError(
            f"{truth}: is {other[0]}x{other[1]} pixels, its image {image} {size[0]}x{size[1]}"
        )
    return {
        "file_name": str(image),
        "sem_seg_file_name": str(truth),
        "image_id": image.stem,
        "width": size[0],
        "height": size[1],
    }


def class_names(key: str, path: str, classes: int) -> tuple[str, ...]:
    """Return the class names: lines of a file, or numbers if no file is given.

    Raises:
        ConfigError: there is no such file, or its number of names is not the model's of classes.
    """
    if not path:
        return tuple(map(str, range(classes)))
    if not Path(path).expanduser().is_file():
        raise ConfigError(f"{key}: there is no file {path!r}")
    names = read_class_names(Path(path).expanduser())
    check_count(f"{key}: {path}", names, classes)
    return names


def check_count(where: str, names: Sequence[str], classes: int) -> None:
    """Refuse names whose number is not the model's number of classes."""
    if len(names) != classes:
        raise ConfigError(
            f"{where}: the pixels have {len(names)} classes, the model {classes}; set "
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
        )
