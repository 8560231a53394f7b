"""Image sets with one folder per class: ROOT/train/<class>/* and ROOT/test (or val)/<class>/*."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.transforms.v2 import functional as transforms

from classification.data.image_set import ImageSet
from classification.data.resident import ResidentSet
from classification.data.source import Source, register
from pcka.engine.config import ConfigError
from pcka.engine.progress import Progress

DECODING_THREADS = 4
FOLDERS = {"train": ("train",), "test": ("test", "val")}  # the first that exists serves


@dataclass(frozen=True)
class ImageFiles:
    """Image files by position.

    Attributes:
        folder: that they lie in, at any depth.
        names: relative to it, (N,) bytes: one array, because a million Python strings would be
            copied into every worker process as their reference counts change.
    """

    folder: Path
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def digest(self) -> str:
        """A digest (hex) of names and sizes."""
        sizes = [os.stat(self.path(position)).st_size for position in range(len(self))]
        digest = hashlib.sha256(b"\0".join(self.names.tolist()))
        digest.update(np.array(sizes, dtype=np.int64).data)
        return digest.hexdigest()

    def path(self, position: int) -> str:
        """Return the path of one file."""
        return os.path.join(self.folder, os.fsdecode(self.names[position]))

    def open(self, position: int) -> Image.Image:
        """Return one image in RGB; an image that cannot be decoded names its file."""
        path = self.path(position)
        try:
            if not os.path.isfile(path):  # to open a pipe is to wait for ever
                raise OSError("it is no regular file")
            with Image.open(path) as file:
                return _eight_bits(file).convert("RGB")
        except Exception as error:  # what a decoder meets in a broken file is of many types
            raise ConfigError(f"cannot decode the image {path!r}: {error}") from error

    def take(self, indices: np.ndarray) -> ImageFiles:
        """Return the files at ``indices``, (M,) int64, in that order."""
        return replace(self, names=self.names[indices])


def _eight_bits(image: Image.Image) -> Image.Image:
    """The upper eight of sixteen bits of grey, as Pillow takes them of colours; it would clip.

    Raises:
        ValueError: numbers whose range no format states.
    """
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are of 32 bits (mode {image.mode}), and which is white is not said; "
            "save it with 8 or 16 bits"
        )
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def cut_centre(image: Image.Image, resize: int, image_size: int) -> Tensor:
    """Return the centre of an image, (3, image_size, image_size) uint8.

    Args:
        image: RGB.
        resize: what the shorter side is resized to before, pixels.
        image_size: side of the centre, pixels.
    """
    image = transforms.resize(image, resize, antialias=True)
    return transforms.pil_to_tensor(transforms.center_crop(image, [image_size, image_size]))


@dataclass(frozen=True)
class FolderSource(Source):
    """A source whose images can also be opened one by one.

    Attributes:
        files: of the images, (N,).
        image_size: side of the images that are read, pixels.
    """

    files: ImageFiles
    image_size: int

    def open(self, data: CfgNode, chosen: np.ndarray, *, evaluated: bool) -> ImageSet:
        """Return some of the images, resident or streaming as ``DATA.STREAM`` says."""
        resize = data.RESIZE or data.IMAGE_SIZE
        if resize < data.IMAGE_SIZE:
            raise ConfigError(
                f"DATA.RESIZE: expected at least DATA.IMAGE_SIZE ({data.IMAGE_SIZE}), which is cut "
                f"out of it, got {resize}; 0 takes DATA.IMAGE_SIZE"
            )
        labels = torch.from_numpy(self.labels[chosen])
        if data.STREAM:
            from classification.data.streaming import StreamingSet  # which reads these files

            files = self.files.take(chosen)
            size = (data.IMAGE_SIZE, resize)
            return StreamingSet(files, labels, self.classes, *size, workers=data.WORKERS)
        side = resize if evaluated else self.image_size
        images = read_files(self.files, self.image_size, side, chosen)
        return ResidentSet(images, labels, self.classes)


@register("folder")
def folder_source(data: CfgNode, split: str) -> FolderSource:
    """Return the ``train`` or ``test`` part of a class-per-folder set; classes are alphabetical.

    Args:
        data: ROOT, the folder that holds the parts; IMAGE_SIZE, the side of the images that
            ``read`` gives, pixels: the shorter side is resized to it and the centre cut out.
        split: "train" or "test" (a folder ``test`` or else ``val``).

    Raises:
        ConfigError: no such folder, no class folders, a class without images, or a folder that a
            link leads to a second time.
    """
    folders = [Path(data.ROOT).expanduser() / name for name in FOLDERS[split]]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None:
        raise ConfigError(
            f"DATA.ROOT: expected the folder {' or '.join(str(path) for path in folders)} with "
            "one folder of images per class in it, found none"
        )
    _refuse_second_visits(folder)
    try:
        classes, _ = find_classes(folder)
        found = make_dataset(folder, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise ConfigError(f"DATA.ROOT: {folder} is not a class-per-folder set: {error}") from error
    names = [os.fsencode(path.removeprefix(f"{folder}{os.sep}")) for path, _ in found]
    files = ImageFiles(folder, np.array(names))
    labels = np.array([label for _, label in found], dtype=np.int64)
    read = partial(read_files, files, data.IMAGE_SIZE, data.IMAGE_SIZE)
    return FolderSource(labels, tuple(classes), read, files, data.IMAGE_SIZE)


def _refuse_second_visits(folder: Path) -> None:
    """Links are followed; one into a folder that is read already would label its images anew."""
    first: dict[tuple[int, int], str] = {}
    for path, _, _ in os.walk(folder, followlinks=True):
        about = os.stat(path)
        other = first.setdefault((about.st_dev, about.st_ino), path)
        if other != path:
            raise ConfigError(
                f"DATA.ROOT: {other} and {path} are one folder, by a link, and its images would be "
                "read twice; remove the link"
            )


def read_files(files: ImageFiles, image_size: int, resize: int, indices: np.ndarray) -> Tensor:
    """Return the centres of some images, (M, 3, image_size, image_size) uint8.

    Args:
        files: that hold them.
        image_size: side of the centres, pixels.
        resize: what the shorter side is resized to before, pixels.
        indices: (M,), positions in ``files``.

    Raises:
        ConfigError: an image that cannot be decoded; its file is named.
    """
    images = torch.empty(len(indices), 3, image_size, image_size, dtype=torch.uint8)

    def fill(position: int) -> None:
        images[position] = cut_centre(files.open(indices[position]), resize, image_size)

    with Progress("decoding", len(indices)) as bar, ThreadPoolExecutor(DECODING_THREADS) as pool:
        try:
            for _ in pool.map(fill, range(len(indices))):
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return images
