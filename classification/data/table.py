"""Tables of image paths and labels: ROOT/train.csv and ROOT/test.csv (or val), or .parquet."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fvcore.common.config import CfgNode

from classification.data.image_files import FilesOnDisk, FileSource, file_source
from classification.data.listing import class_indices, missing_part, part_names
from classification.data.source import register
from pcka.engine.config import ConfigError, near_names
from pcka.extras import optional_package


@dataclass(frozen=True)
class Table:
    """Two columns of a file.

    Attributes:
        file: the file that was read.
        paths: paths of the images, as they appear there, (N,).
        labels: likewise, (N,).
        place: row -> its location, for messages.
    """

    file: Path
    paths: Sequence[object]
    labels: Sequence[object]
    place: Callable[[int], str]


@register("table")
def table_source(data: CfgNode, split: str) -> FileSource:
    """Return the ``train`` or ``test`` part of a set described by tables of paths and labels.

    Args:
        data: ROOT, the folder of the tables; TRAIN_PART and TEST_PART, their files ("": ``train``,
            and ``test`` or else ``val`` or ``validation``, with the suffix ``.csv`` or
            ``.parquet``); IMAGE_COLUMN and LABEL_COLUMN, their columns ("": ``path`` and
            ``label``); IMAGE_SIZE. Paths are relative to the table's folder. For the classes, see
            :func:`class_indices`.
        split: "train" or "test".

    Raises:
        ConfigError: no such table, a missing column, or a row without its file or label.
        ImportError: a ``.parquet`` file without pyarrow.
    """
    root = Path(data.ROOT).expanduser()
    file = _file(root, data, split)
    columns = data.IMAGE_COLUMN or "path", data.LABEL_COLUMN or "label"
    table = READERS[file.suffix](file, *columns)
    if not table.paths:
        raise ConfigError(f"DATA.ROOT: {file} has no rows; list one image per row")
    files = FilesOnDisk(file.parent, _found(table))
    labels, classes = class_indices(table.labels, root, table.place)
    return file_source(files, labels, classes, data.IMAGE_SIZE)


def _file(root: Path, data: CfgNode, split: str) -> Path:
    names = part_names(data, split)
    for path in (root / f"{name}{suffix}" for name in names for suffix in ("", *READERS)):
        if path.suffix in READERS and path.is_file():
            return path
    tables = " or ".join(str(root / name) for name in names)
    raise missing_part(data, split, f"the table {tables}, a file {' or '.join(READERS)}")


def _read_csv(file: Path, path_column: str, label_column: str) -> Table:
    paths, labels, lines = [], [], []
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:  # Excel writes a byte order mark
            rows = csv.reader(text, strict=True)
            header = next(rows, [])
            chosen = [_column(file, name, header, key) for name, key in
                      ((path_column, "IMAGE_COLUMN"), (label_column, "LABEL_COLUMN"))]  # fmt: skip
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise ConfigError(
                        f"{file}, line {rows.line_num}: has {len(row)} fields, the header "
                        f'{len(header)}; quote a path or label that has a comma ("…")'
                    )
                path, label = (row[index] for index in chosen)
                paths.append(path)
                labels.append(label)
                lines.append(rows.line_num)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}: cannot be read as UTF-8 text ({error.reason}); save it in that encoding"
        ) from error
    except csv.Error as error:
        raise ConfigError(f"{file}, line {rows.line_num}: not valid CSV: {error}") from error
    return Table(file, paths, labels, lambda row: f"{file}, line {lines[row]}")


def _read_parquet(file: Path, path_column: str, label_column: str) -> Table:
    parquet = optional_package("pyarrow.parquet", "parquet")
    try:
        header = parquet.read_schema(file).names
        for name, key in ((path_column, "IMAGE_COLUMN"), (label_column, "LABEL_COLUMN")):
            _column(file, name, header, key)
        table = parquet.read_table(file, columns=[path_column, label_column])
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # includes pyarrow's errors
        raise ConfigError(f"{file}: cannot be read as Parquet: {error}") from error
    paths, labels = (table[name].to_pylist() for name in (path_column, label_column))
    return Table(file, paths, labels, lambda row: f"{file}, row {row}")


READERS = {".csv": _read_csv, ".parquet": _read_parquet}


def _column(file: Path, name: str, header: Sequence[str], key: str) -> int:
    if name not in header:
        raise ConfigError(
            f"DATA.{key}: {file} has no column {name!r}; {near_names(name, header or ['none'])}"
        )
    return header.index(name)


def _found(table: Table) -> np.ndarray:
    """Return the paths as bytes, after checking that each file exists."""
    folder = table.file.parent
    for row, path in enumerate(table.paths):
        if not path or not isinstance(path, str):
            raise ConfigError(f"{table.place(row)}: has no image path; add it, or remove the row")
        if not os.path.isfile(os.path.join(folder, path)):
            raise ConfigError(
                f"{table.place(row)}: there is no file {path!r} in {str(folder)!r}; correct the "
                "path, which is relative to the table, or remove the row"
            )
    return np.array([os.fsencode(str(path)) for path in table.paths])
