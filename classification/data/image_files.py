"""Encoded images on disk as a source, resident in memory or streaming."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from classification.data.image_set import ImageSet
from classification.data.resident import ResidentSet
from classification.data.source import Source
from pcka.engine.config import ConfigError
from pcka.engine.progress import Progress

DECODING_THREADS = 4

Self = TypeVar("Self", bound="ImageFiles")


class ImageFiles(ABC):
    """Encoded images by position; threads and worker processes open them independently."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self: Self, indices: np.ndarray) -> Self:
        """Return the images at ``indices``, (M,) int64, in that order."""

    @abstractmethod
    def path(self, position: int) -> str:
        """Return the location of one image, for messages."""

    @abstractmethod
    def content(self, position: int) -> str | BytesIO:
        """Return the path or the bytes of one image file."""

    @abstractmethod
    def about(self) -> tuple[Sequence[bytes], Sequence[int]]:
        """Return the names and the sizes in bytes of all images, without reading any."""

    @cached_property
    def digest(self) -> str:
        """A digest (hex) of names and sizes."""
        names, sizes = self.about()
        digest = hashlib.sha256(b"\0".join(names))
        digest.update(np.array(sizes, dtype=np.int64).data)
        return digest.hexdigest()

    def open(self, position: int) -> Image.Image:
        """Return one image in RGB; the error for an undecodable one names it."""
        try:
            with Image.open(self.content(position)) as file:
                return _eight_bits(file).convert("RGB")
        except Exception as error:  # decoders raise many types of errors for broken files
            raise ConfigError(
                f"cannot decode the image {self.path(position)!r}: {error}; replace it, or "
                "remove it from the data"
            ) from error


@dataclass(frozen=True)
class FilesOnDisk(ImageFiles):
    """Individual image files.

    Attributes:
        folder: the folder that contains them, at any depth.
        names: paths in it, (N,) bytes: one array, because a million Python strings would be
            copied into every worker process as their reference counts change.
    """

    folder: Path
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: np.ndarray) -> FilesOnDisk:
        return replace(self, names=self.names[indices])

    def path(self, position: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.names[position]))

    def content(self, position: int) -> str:
        path = self.path(position)
        if not os.path.isfile(path):  # opening a pipe would block forever
            raise OSError("not a regular file")
        return path

    def about(self) -> tuple[list[bytes], list[int]]:
        sizes = [os.stat(self.path(position)).st_size for position in range(len(self))]
        return self.names.tolist(), sizes


def _eight_bits(image: Image.Image) -> Image.Image:
    """Keep the upper 8 bits of 16-bit grey, as Pillow does for colours; it would clip grey.

    Raises:
        ValueError: 32-bit pixels, whose range no format defines.
    """
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels have 32 bits (mode {image.mode}) and no known white level; "
            "save it with 8 or 16 bits"
        )
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def cut_centre(image: Image.Image, resize: int, image_size: int) -> Tensor:
    """Return the centre crop of an image, (3, image_size, image_size) uint8.

    Args:
        image: RGB.
        resize: size of the shorter side before cropping, pixels.
        image_size: side of the crop, pixels.
    """
    image = transforms.resize(image, resize, antialias=True)
    return transforms.pil_to_tensor(transforms.center_crop(image, [image_size, image_size]))


@dataclass(frozen=True)
class FileSource(Source):
    """A source whose images can also be opened one by one.

    Attributes:
        files: files of the images, (N,).
        image_size: side of the images that are read, pixels.
    """

    files: ImageFiles
    image_size: int

    def open(self, data: CfgNode, chosen: np.ndarray, *, evaluated: bool) -> ImageSet:
        """Return the chosen images, resident or streaming according to ``DATA.STREAM``."""
        resize = data.RESIZE or data.IMAGE_SIZE
        if resize < data.IMAGE_SIZE:
            raise ConfigError(
                f"DATA.RESIZE: expected at least DATA.IMAGE_SIZE ({data.IMAGE_SIZE}), the size of "
                f"the crop, got {resize}; 0 uses DATA.IMAGE_SIZE"
            )
        labels = torch.from_numpy(self.labels[chosen])
        if data.STREAM:
            from classification.data.streaming import StreamingSet  # imports this module

            files = self.files.take(chosen)
            size = (data.IMAGE_SIZE, resize)
            return StreamingSet(files, labels, self.classes, *size, workers=data.WORKERS)
        side = resize if evaluated else self.image_size
        images = read_files(self.files, self.image_size, side, chosen)
        return ResidentSet(images, labels, self.classes)


def file_source(
    files: ImageFiles, labels: np.ndarray, classes: Sequence[str], image_size: int
) -> FileSource:
    """Return image files as a source.

    Args:
        files: files of the images, (N,).
        labels: class index of each, (N,) int64.
        classes: class names, by index.
        image_size: side of the images that ``read`` returns, pixels: the shorter side is resized
            to it and the centre cropped.
    """
    read = partial(read_files, files, image_size, image_size)
    return FileSource(labels, tuple(classes), read, files, image_size)


def read_files(files: ImageFiles, image_size: int, resize: int, indices: np.ndarray) -> Tensor:
    """Return the centre crops of some images, (M, 3, image_size, image_size) uint8.

    Args:
        files: the image files.
        image_size: side of the crops, pixels.
        resize: size of the shorter side before cropping, pixels.
        indices: (M,), positions in ``files``.

    Raises:
        ConfigError: an image cannot be decoded; the message names its file.
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
