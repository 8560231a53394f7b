"""Image sets with one folder per class: ROOT/train/<class>/* and ROOT/test (or val)/<class>/*.

Without these folders, ROOT/<class>/* are trained on, except for DATA.HOLDOUT evaluation images.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from fvcore.common.config import CfgNode
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from classification.data.image_files import FilesOnDisk, FileSource, file_source
from classification.data.source import register
from pcka.engine.config import ConfigError

FOLDERS = {"train": ("train",), "test": ("test", "val")}  # the first that exists is used
OTHER_FORMS = "DATA.NAME table, webdataset or huggingface reads other layouts"


@register("folder")
def folder_source(data: CfgNode, split: str) -> FileSource:
    """Return the ``train`` or ``test`` part of a class-per-folder set; classes are alphabetical.

    Args:
        data: ROOT, the folder that holds the parts; IMAGE_SIZE, the side of the images that
            ``read`` returns, pixels: the shorter side is resized to it and the centre cropped.
        split: "train" or "test" (a folder ``test`` or else ``val``).

    Raises:
        ConfigError: no such folder, no class folders, a class without images, or a folder reached a
            second time through a link.
    """
    root = Path(data.ROOT).expanduser()
    folders = [root / name for name in FOLDERS[split]]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None and split == "train" and not has_test_folder(data) and has_classes(root):
        folder = root
    if folder is None:
        raise ConfigError(
            f"DATA.ROOT: expected the folder {' or '.join(str(path) for path in folders)} with "
            "one folder of images per class in it, found none; "
            + ("DATA.HOLDOUT N evaluates on training images" if split == "test" else OTHER_FORMS)
        )
    _refuse_second_visits(folder)
    try:
        classes, _ = find_classes(folder)
        found = make_dataset(folder, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise ConfigError(f"DATA.ROOT: {folder} is not a class-per-folder set: {error}") from error
    names = [os.fsencode(path.removeprefix(f"{folder}{os.sep}")) for path, _ in found]
    files = FilesOnDisk(folder, np.array(names))
    labels = np.array([label for _, label in found], dtype=np.int64)
    return file_source(files, labels, classes, data.IMAGE_SIZE)


def has_test_folder(data: CfgNode) -> bool:
    """Whether ``DATA.ROOT`` has a separate folder of evaluation images."""
    return any((Path(data.ROOT).expanduser() / name).is_dir() for name in FOLDERS["test"])


def has_classes(root: Path) -> bool:
    """Whether the folder's subfolders contain images, as class folders do."""
    return any(path.suffix.lower() in IMG_EXTENSIONS for path in root.glob("*/*"))


def _refuse_second_visits(folder: Path) -> None:
    """Refuse links into a folder already read, whose images would get a second label."""
    first: dict[tuple[int, int], str] = {}
    for path, _, _ in os.walk(folder, followlinks=True):
        about = os.stat(path)
        other = first.setdefault((about.st_dev, about.st_ino), path)
        if other != path:
            raise ConfigError(
                f"DATA.ROOT: {other} and {path} are one folder through a link: its images would be "
                "read twice; remove the link"
            )
