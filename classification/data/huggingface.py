"""Data sets of Hugging Face's ``datasets`` on disk: folders of ``save_to_disk``, Parquet files."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from classification.data.image_files import FileSource, ImageFiles, file_source
from classification.data.listing import class_indices, files_like, missing_part, part_names
from classification.data.source import register
from pcka.engine.config import ConfigError
from pcka.extras import optional_package

SAVED = "state.json"  # in each folder of save_to_disk
PARQUET = ("{}-*.parquet", "{}.parquet", "{}/*.parquet", "data/{}-*.parquet", "data/{}.parquet")


@dataclass(frozen=True)
class FilesInRows(ImageFiles):
    """Image files in the rows of a data set.

    Attributes:
        rows: the data set with this column only, images undecoded.
        column: its name.
        name: the data set's name in messages.
        positions: rows of the images, (N,) int64.
        sizes: sizes of the images, bytes, (N,) int64.
    """

    rows: Any
    column: str
    name: str
    positions: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, indices: np.ndarray) -> FilesInRows:
        return replace(self, positions=self.positions[indices], sizes=self.sizes[indices])

    def path(self, position: int) -> str:
        return f"{self.name}, row {self.positions[position]}"

    def content(self, position: int) -> str | BytesIO:
        image = self.rows[int(self.positions[position])][self.column] or {}
        return BytesIO(image["bytes"]) if image.get("bytes") else str(image.get("path") or "")

    def about(self) -> tuple[list[bytes], list[int]]:
        return [str(position).encode() for position in self.positions], self.sizes.tolist()


@register("huggingface")
def huggingface_source(data: CfgNode, split: str) -> FileSource:
    """Return the ``train`` or ``test`` part of a ``datasets`` data set on disk.

    Args:
        data: ROOT, a folder of ``save_to_disk``, or one of Parquet files named as on the Hub
            (``datasets`` keeps a copy of these in its cache); TRAIN_PART and TEST_PART, the splits
            ("": ``train``, and ``test`` or else ``val`` or ``validation``); IMAGE_COLUMN and
            LABEL_COLUMN ("": the only column with the feature ``Image`` or ``ClassLabel``);
            IMAGE_SIZE. For label columns with other features, see :func:`class_indices`.
        split: "train" or "test".

    Raises:
        ConfigError: no such data set or split, a missing or ambiguous column, a missing image, or
            a row without a label.
        ImportError: ``datasets`` is not installed.
    """
    datasets = optional_package("datasets", "datasets")
    root = Path(data.ROOT).expanduser()
    name, rows = _load(datasets, root, data, split)
    if not len(rows):
        raise ConfigError(f"DATA.ROOT: {name} has no rows")
    image = _column(rows, datasets.Image, data.IMAGE_COLUMN, f"DATA.IMAGE_COLUMN: {name}")
    label = _column(rows, datasets.ClassLabel, data.LABEL_COLUMN, f"DATA.LABEL_COLUMN: {name}")
    labels, classes = _labels(rows, label, root, name)
    files = _files(datasets, rows, image, name)
    return file_source(files, labels, classes, data.IMAGE_SIZE)


def _load(datasets: Any, root: Path, data: CfgNode, split: str) -> tuple[str, Any]:
    """Return the split's name in messages, and its data set."""
    saved = [root / name for name in part_names(data, split)]
    if split == "train" and not data.TRAIN_PART:
        saved.append(root)  # a data set without splits
    for folder in saved:
        if (folder / SAVED).is_file():
            return str(folder), _opened(datasets.load_from_disk, str(folder))
    for name in part_names(data, split):
        for pattern in PARQUET:
            if found := files_like(root, pattern.format(name)):
                where = found[0] if len(found) == 1 else str(root / pattern.format(name))
                return where, _opened(datasets.Dataset.from_parquet, found)
    raise missing_part(
        data,
        split,
        f"{saved[0]} of save_to_disk, or {root / PARQUET[0].format(saved[0].name)}",
    )


def _opened(load: Any, where: str | list[str]) -> Any:
    try:
        return load(where)
    except Exception as error:  # raised by datasets, pyarrow or json
        first = where if isinstance(where, str) else where[0]
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ConfigError(f"DATA.ROOT: {first} cannot be read by datasets: {reason}") from error


def _column(rows: Any, feature: type, given: str, where: str) -> str:
    """Return the given column, or the only one with the feature."""
    found = [given] if given else _of_feature(rows, feature)
    if len(found) == 1 and found[0] in rows.features:
        return found[0]
    wrong = f"has no column {given!r}" if given else f"has {len(found)} {feature.__name__} columns"
    columns = ", ".join(f"{name} ({kind!r})" for name, kind in rows.features.items())
    raise ConfigError(f"{where} {wrong}; name one of these: {columns}")


def _of_feature(rows: Any, feature: type) -> list[str]:
    return [name for name, kind in rows.features.items() if isinstance(kind, feature)]


def _labels(rows: Any, column: str, root: Path, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    labels = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    classes = getattr(rows.features[column], "names", None)
    if classes is None:
        return class_indices(labels, root, lambda row: f"{name}, row {row}")
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < len(classes):
            raise ConfigError(
                f"{name}, row {row}: the label {label} in {column!r} is not one of its "
                f"{len(classes)} classes; use another split (DATA.TRAIN_PART, TEST_PART), or "
                "filter out such rows"
            )
    return np.array(labels, dtype=np.int64), tuple(classes)


def _files(datasets: Any, rows: Any, column: str, name: str) -> FilesInRows:
    try:
        alone = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # raised by pyarrow: the column cannot be read as images
        raise ConfigError(
            f"DATA.IMAGE_COLUMN: {name}: {column!r} is not an image column: {error}"
        ) from error
    files = FilesInRows(alone, column, name, np.arange(len(alone)), _lengths(alone, column))
    for row in np.flatnonzero(files.sizes == 0).tolist():
        content = files.content(row)
        if not isinstance(content, str) or not os.path.isfile(content):
            raise ConfigError(
                f"{name}, row {row}: {column!r} holds no image, nor the path of an existing one "
                f"({content!r}); filter out such rows, or let save_to_disk embed the images"
            )
        files.sizes[row] = os.path.getsize(content)
    return files


def _lengths(rows: Any, column: str) -> np.ndarray:
    """Return the sizes in bytes of images stored in the data, (N,) int64; 0 for paths."""
    compute = optional_package("pyarrow.compute", "datasets")
    content = compute.struct_field(rows.with_format("arrow")[:][column], "bytes")
    return compute.fill_null(compute.binary_length(content), 0).to_numpy().astype(np.int64)
