"""Image sets with one folder per class: ROOT/train/<class>/* and ROOT/test (or val)/<class>/*."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from classification.data.image_set import Source

DECODING_THREADS = 4
FOLDERS = {"train": ("train",), "test": ("test", "val")}  # the first that exists serves


def folder_source(root: str, split: str, image_size: int) -> Source:
    """Return the ``train`` or ``test`` part of a class-per-folder set; classes are alphabetical.

    Args:
        root: folder that holds the parts.
        split: "train" or "test" (a folder ``test`` or else ``val``).
        image_size: side of the images, pixels: the shorter side is resized to it and the centre
            cut out.

    Raises:
        ValueError: no such folder, no class folders, or a class without images.
    """
    folders = [Path(root).expanduser() / name for name in FOLDERS[split]]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None:
        raise ValueError(
            f"DATA.ROOT: expected the folder {' or '.join(str(path) for path in folders)} with "
            "one folder of images per class in it, found none"
        )
    try:
        classes, _ = find_classes(folder)
        files = make_dataset(folder, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise ValueError(f"DATA.ROOT: {folder} is not a class-per-folder set: {error}") from error
    paths = [path for path, _ in files]
    labels = np.array([label for _, label in files], dtype=np.int64)
    return Source(labels, tuple(classes), partial(_read, paths, image_size))


def _read(paths: Sequence[str], image_size: int, indices: np.ndarray) -> Tensor:
    images = torch.empty(len(indices), 3, image_size, image_size, dtype=torch.uint8)

    def fill(position: int) -> None:
        images[position] = _decode(paths[indices[position]], image_size)

    bar = tqdm(total=len(indices), desc="decoding", unit="img", leave=False, disable=None)
    with bar, ThreadPoolExecutor(DECODING_THREADS) as pool:
        try:
            for _ in pool.map(fill, range(len(indices))):
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return images


def _decode(path: str, image_size: int) -> Tensor:
    """Return one image as (3, S, S) uint8; an image that cannot be decoded names its file."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:  # what a decoder meets in a broken file is of many types
        raise ValueError(f"cannot decode the image {path!r}: {error}") from error
    image = transforms.resize(image, image_size, antialias=True)
    return transforms.pil_to_tensor(transforms.center_crop(image, [image_size, image_size]))
