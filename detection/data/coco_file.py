"""Annotation files in COCO's format, checked before training."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pcka.engine.config import ConfigError

logger = logging.getLogger("detectron2.pcka")

NAMED = 5  # images that a message lists
ODD_ID = "has an id that is neither a whole number nor text"


class DamagedFileError(ConfigError):
    """A file whose content cannot be used under any configuration."""


def read_coco(key: str, path: str) -> dict[str, Any]:
    """Return the content of a file in COCO's format, whose categories have ids and names.

    Args:
        key: configuration key, for messages.
        path: path of the JSON file.

    Raises:
        DamagedFileError: the format is wrong, or categories are not uniquely identified.
    """
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text())
        listed = list(content["categories"])
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedFileError(
            f"{key}: {path} is not in COCO's format, an object with 'images', 'annotations' and "
            f"'categories' ({error!r})"
        ) from error
    _refuse(f"{key}: {path}", "categories", listed, _fault_of_category)
    _check_ids(f"{key}: {path}: categories", listed)
    return content


def check_coco(
    key: str, path: str, content: Mapping[str, Any], images: str, *, evaluated: bool
) -> None:
    """Refuse images and objects that would fail, or be skipped, in the middle of a run.

    Boxes without area inside their image are logged as a warning: nothing learns from them.

    Args:
        key: configuration key, for messages.
        path: path of the JSON file.
        content: as returned by :func:`read_coco`.
        images: folder of the images.
        evaluated: the set is for evaluation, which requires ``area`` and ``iscrowd``.

    Raises:
        DamagedFileError: some entries are invalid; the message says how many, and shows the first.
    """
    where = f"{key}: {path}"
    pictures = _entries(content, "images", where)
    _refuse(where, "images", pictures, _fault_of_image)
    _check_ids(f"{where}: images", pictures)
    _check_files(where, pictures, Path(images))
    if evaluated and "annotations" not in content:  # a set whose truth is not published
        return
    objects = _entries(content, "annotations", where)
    kinds = {entry["id"] for entry in content["categories"]}
    by_id = {entry["id"]: entry for entry in pictures}
    _refuse(where, "annotations", objects, lambda entry: _fault_of_object(entry, kinds, evaluated))
    _check_ids(f"{where}: annotations", objects)
    _check_boxes(where, objects, by_id, refused=not evaluated)


def _entries(content: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    found = content.get(name)
    if not isinstance(found, list):
        raise DamagedFileError(f"{where}: expected a list of {name}, got {_short(found)}")
    return found


def _refuse(
    where: str, kind: str, entries: Iterable[Any], fault: Callable[[dict[str, Any]], str]
) -> None:
    """Refuse entries with a fault; the message shows the first."""
    faults = [
        (entry, found)
        for entry in entries
        if (found := fault(entry) if isinstance(entry, dict) else "is not an object")
    ]
    if faults:
        entry, found = faults[0]
        raise DamagedFileError(
            f"{where}: {len(faults)} of its {kind} cannot be used; the first {found}: "
            f"{_short(entry)}"
        )


def _fault_of_category(entry: dict[str, Any]) -> str:
    if missing := [name for name in ("id", "name") if name not in entry]:
        return f"has no {', '.join(missing)}"
    return "" if isinstance(entry["id"], int | str) else ODD_ID


def _fault_of_image(entry: dict[str, Any]) -> str:
    if missing := [name for name in ("id", "file_name", "width", "height") if name not in entry]:
        return f"has no {', '.join(missing)}"
    if not isinstance(entry["id"], int | str):
        return ODD_ID
    if not entry["file_name"] or not isinstance(entry["file_name"], str):
        return "has an invalid file_name"
    if not all(_is_number(entry[side]) and entry[side] >= 1 for side in ("width", "height")):
        return "has a width or height below 1"
    return ""


def _fault_of_object(entry: dict[str, Any], kinds: set[Any], evaluated: bool) -> str:
    wanted = ["id", "image_id", "category_id", "bbox", *(["area", "iscrowd"] * evaluated)]
    if missing := [name for name in wanted if name not in entry]:
        return f"has no {', '.join(missing)}"
    if not all(isinstance(entry[name], int | str) for name in wanted if name.endswith("id")):
        return ODD_ID
    if entry["category_id"] not in kinds:
        return f"has a category_id that is not in categories ({entry['category_id']!r})"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "has a bbox that is not four finite numbers (x, y, width, height)"
    if box[2] < 0 or box[3] < 0:
        return "has a bbox of negative width or height"
    if evaluated and not _is_number(entry["area"]):
        return "has an area that is not a finite number"
    return ""


def _check_ids(where: str, entries: Iterable[Mapping[str, Any]]) -> None:
    """Refuse ids that are not unique, or that cannot be sorted."""
    counts = Counter(entry["id"] for entry in entries)
    if len({isinstance(number, str) for number in counts}) > 1:
        raise DamagedFileError(f"{where}: some ids are numbers and some are text; use numbers")
    if twice := [number for number, count in counts.items() if count > 1]:
        raise DamagedFileError(f"{where}: {len(twice)} duplicate ids, the first is {twice[0]!r}")


def _check_files(where: str, pictures: list[dict[str, Any]], folder: Path) -> None:
    listed = set(os.listdir(folder))
    names = [entry["file_name"] for entry in pictures]
    missing = [n for n in names if n not in listed and not (folder / n).is_file()]
    if missing:
        counts = f"{len(missing)} of its {len(names)} images"
        raise DamagedFileError(
            f"{where}: {counts} are not in {str(folder)!r}: {first_names(missing)}"
        )


def _check_boxes(
    where: str,
    objects: list[dict[str, Any]],
    pictures: Mapping[Any, dict[str, Any]],
    *,
    refused: bool,
) -> None:
    """Warn of boxes that no detector can learn; refuse a set that has no others."""
    placed = [(entry["bbox"], pictures[entry["image_id"]]) for entry in objects
              if entry["image_id"] in pictures]  # fmt: skip
    lost = [picture["file_name"] for box, picture in placed if not _inside(box, picture)]
    if not lost:
        return
    if refused and len(lost) == len(placed):
        raise DamagedFileError(
            f"{where}: none of its {len(placed)} boxes has an area inside its image"
        )
    logger.warning(
        "%s: %d of its %d boxes have no area inside their image and do not count as objects, in %s",
        where, len(lost), len(placed), first_names(list(dict.fromkeys(lost))),
    )  # fmt: skip


def _inside(box: list[float], picture: Mapping[str, Any]) -> bool:
    x, y, width, height = box
    across = min(x + width, picture["width"]) > max(x, 0)
    return across and min(y + height, picture["height"]) > max(y, 0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def first_names(names: list[str]) -> str:
    """Return the first few names of a list, for a message."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _short(entry: object) -> str:
    text = json.dumps(entry)
    return text if len(text) <= 200 else f"{text[:200]} ..."
