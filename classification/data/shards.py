"""WebDataset shards: tar files ROOT/train-*.tar and ROOT/test-*.tar (or val); random access."""

from __future__ import annotations

import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from fvcore.common.config import CfgNode

from classification.data.image_files import FileSource, ImageFiles, file_source
from classification.data.listing import class_indices, files_like, missing_part, part_names
from classification.data.source import register
from pcka.engine.config import ConfigError

PATTERNS = ("{}-*.tar", "{}_*.tar", "{}.tar", "{}/*.tar")
IMAGES = ("jpg", "jpeg", "png", "webp")
LABEL = "label"  # field of a .json member


class Sample(NamedTuple):
    """An image of a shard, and its label."""

    member: str
    offset: int
    size: int
    label: object


@dataclass(frozen=True)
class FilesInShards(ImageFiles):
    """Image files within tar files, by their position there.

    Attributes:
        root: folder of the shards.
        shards: their paths relative to it.
        members: names of the images in their shards, (N,) bytes.
        shard: index of each image's shard, (N,).
        offset: start of the image in its shard, bytes, (N,) int64.
        size: size of the image, bytes, (N,) int64.
    """

    root: Path
    shards: tuple[str, ...]
    members: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.members)

    def take(self, indices: np.ndarray) -> FilesInShards:
        arrays = {name: getattr(self, name)[indices]
                  for name in ("members", "shard", "offset", "size")}  # fmt: skip
        return replace(self, **arrays)

    def path(self, position: int) -> str:
        return os.path.join(self._shard(position), os.fsdecode(self.members[position]))

    def content(self, position: int) -> BytesIO:
        with open(self._shard(position), "rb") as shard:
            shard.seek(self.offset[position])
            return BytesIO(shard.read(self.size[position]))

    def about(self) -> tuple[list[bytes], list[int]]:
        names = [os.fsencode(self.shards[shard]) for shard in self.shard]
        return [b"/".join(pair) for pair in zip(names, self.members.tolist())], self.size.tolist()

    def _shard(self, position: int) -> str:
        return os.path.join(self.root, self.shards[self.shard[position]])


@register("webdataset")
def shard_source(data: CfgNode, split: str) -> FileSource:
    """Return the ``train`` or ``test`` part of a set of WebDataset shards.

    A sample is an image and, under the same name, a ``.cls`` with its label or a ``.json`` object
    that contains it. ``DATA.WORKERS`` processes index the shards at the start; images are then read
    in any order.

    Args:
        data: ROOT, the folder of the shards; TRAIN_PART and TEST_PART, patterns of their names
            ("": ``train-*.tar``, and ``test-*.tar`` or else ``val-*.tar`` or ``validation-*.tar``);
            LABEL_COLUMN, the field of the ``.json`` ("": ``.cls`` if there is one, or else
            ``label``); IMAGE_SIZE. For the classes, see :func:`class_indices`.
        split: "train" or "test".

    Raises:
        ConfigError: no shards, a compressed or broken one, or a sample without a label or without
            exactly one image.
    """
    root = Path(data.ROOT).expanduser()
    shards = _shards(root, data, split)
    samples: list[Sample] = []
    shard: list[int] = []
    for number, found in enumerate(_indexed(shards, data.LABEL_COLUMN, data.WORKERS)):
        samples += found
        shard += [number] * len(found)
    if not samples:
        raise ConfigError(
            f"DATA.ROOT: {shards[0]} and the other {split} shards hold no image; expected members "
            f"such as '0001.jpg' and '0001.cls' ({', '.join(IMAGES)})"
        )
    members, offset, size, labels = zip(*samples)
    files = FilesInShards(
        root,
        tuple(os.path.relpath(path, root) for path in shards),
        np.array([os.fsencode(member) for member in members]),
        np.array(shard, dtype=np.int32),
        np.array(offset, dtype=np.int64),
        np.array(size, dtype=np.int64),
    )
    indices, classes = class_indices(labels, root, files.path)
    return file_source(files, indices, classes, data.IMAGE_SIZE)


def _shards(root: Path, data: CfgNode, split: str) -> list[str]:
    patterns = [
        name if name.endswith(".tar") else pattern.format(name)
        for name in part_names(data, split)
        for pattern in PATTERNS
    ]
    for pattern in patterns:
        if found := files_like(root, pattern):
            return found
    raise missing_part(data, split, f"shards such as {root / patterns[0]}")


def _indexed(shards: list[str], field: str, workers: int) -> Iterator[list[Sample]]:
    """Yield the samples of each shard, read by ``workers`` processes; below 2: by this one."""
    read = partial(_samples, field=field)
    if min(workers, len(shards)) < 2:
        yield from map(read, shards)
        return
    with ProcessPoolExecutor(min(workers, len(shards))) as pool:
        yield from pool.map(read, shards)


def _samples(shard: str, field: str) -> list[Sample]:
    """Return the samples of a shard: the images, their positions, and their labels."""
    try:
        with tarfile.open(shard, "r:") as archive:
            return [
                _sample(archive, f"{shard}: the sample {name!r}", list(group), field)
                for name, group in itertools.groupby(_members(archive), key=lambda part: part[0])
            ]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ConfigError(
            f"{shard}: cannot be read as a tar file ({error}); it must be complete and "
            "uncompressed, as its images are read in any order"
        ) from error


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield name of the sample, extension and member, split as in WebDataset."""
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # otherwise all of them are kept
        path = PurePosixPath(member.name)
        stem, dot, extension = path.name.partition(".")
        if member.isfile() and stem and dot:  # hidden files have no stem
            yield str(path.with_name(stem)), extension.lower(), member


def _sample(
    archive: tarfile.TarFile, where: str, parts: list[tuple[str, str, tarfile.TarInfo]], field: str
) -> Sample:
    images = [member for _, extension, member in parts if extension in IMAGES]
    others = {extension: member for _, extension, member in parts}
    if len(images) != 1:
        raise ConfigError(
            f"{where} has {len(images)} images ({', '.join(others)}), expected one of "
            f"{', '.join(IMAGES)}; the members of a sample must be adjacent in its shard, which "
            "may have been cut short"
        )
    (image,) = images
    label = _label(archive, where, others, field)
    return Sample(image.name, image.offset_data, image.size, label)


def _label(
    archive: tarfile.TarFile, where: str, members: dict[str, tarfile.TarInfo], field: str
) -> object:
    kind = "json" if field or "cls" not in members else "cls"
    if kind not in members:
        raise ConfigError(
            f"{where} has no label: expected a .cls or .json beside {', '.join(members)}; the "
            "members of a sample must be adjacent in its shard"
        )
    file = archive.extractfile(members[kind])
    assert file is not None  # a regular member
    try:
        text = file.read().decode()
        if kind == "cls":
            return text
        content = json.loads(text)
        known = list(content)
        return content[field or LABEL]
    except ValueError as error:
        raise ConfigError(f"{where}: its .{kind} cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"DATA.LABEL_COLUMN: {where}: its .json has no {field or LABEL!r}, expected one of its "
            f"fields: {', '.join(map(str, known)) if isinstance(content, dict) else text[:80]}"
        ) from error
