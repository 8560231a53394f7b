"""Files that name the classes of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pcka.engine.config import ConfigError
from pcka.files import atomic_write

CLASSES_FILE = "classes.txt"


def read_class_names(file: Path) -> tuple[str, ...]:
    """Return the names in a UTF-8 text file, one per line, in the order of the class indices.

    Raises:
        ConfigError: a duplicate name, no names, or another encoding.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text (byte {error.start})") from error
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not (name := line.strip()):
            continue
        if name in first:
            raise ConfigError(
                f"{file}, line {number}: the class {name!r} is already on line {first[name]}; "
                "remove one of them"
            )
        first[name] = number
    if not first:
        raise ConfigError(f"{file}: expected a class name on each line, found none")
    return tuple(first)


def write_class_names(file: Path, classes: Sequence[str]) -> None:
    """Write class names in index order, in the format that :func:`read_class_names` reads."""
    text = "".join(f"{name}\n" for name in classes)
    atomic_write(lambda opened: opened.write(text.encode()), file)
