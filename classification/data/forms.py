"""Detection of the formats of image files in a folder, if ``DATA.NAME`` is not given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fvcore.common.config import CfgNode

from classification.data import huggingface, shards, table
from classification.data.folder import has_classes, has_test_folder
from classification.data.listing import files_like, part_names
from pcka.extras import optional_package

FORMS = ("folder", "huggingface", "table", "webdataset")


def forms_in(data: CfgNode, split: str) -> Iterator[str]:
    """Yield each ``DATA.NAME`` that can read a part of a set in ``DATA.ROOT``.

    Args:
        data: ROOT, TRAIN_PART, TEST_PART and IMAGE_COLUMN are read.
        split: "train" or "test".
    """
    root, names = Path(data.ROOT).expanduser(), part_names(data, split)
    if has_classes(root / "train") if split == "train" else has_test_folder(data):
        yield "folder"
    places = (*names, "") if split == "train" else names
    if any((root / place / huggingface.SAVED).is_file() for place in places):
        yield "huggingface"
    suffixes = ("", *table.READERS)
    tables = [path for name in names for s in suffixes for path in files_like(root, f"{name}{s}")]
    if any(_is_table(Path(path), data.IMAGE_COLUMN or "path") for path in tables):
        yield "table"
    patterns = {"webdataset": shards.PATTERNS, "huggingface": huggingface.PARQUET}
    for form, of_form in patterns.items():
        of_part = [pattern.format(name) for pattern in ("{}", *of_form) for name in names]
        suffix = Path(of_form[0]).suffix
        if any(found.endswith(suffix) for p in of_part for found in files_like(root, p)):
            yield form


def _is_table(path: Path, column: str) -> bool:
    """Whether a file is a table of paths; data sets of the Hub are Parquet files, too."""
    if path.suffix != ".parquet":
        return path.suffix in table.READERS
    try:
        return column in optional_package("pyarrow.parquet", "parquet").read_schema(path).names
    except (OSError, ValueError):  # includes pyarrow's errors; reading the data reports them
        return False
