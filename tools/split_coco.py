"""Hold out images of a COCO annotation file, for choosing settings.

``python tools/split_coco.py train.json --every 5`` writes ``train_part.json`` and
``train_heldout.json`` next to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detection.data.coco_file import read_coco
from pcka.engine.arguments import command_parser
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import write_text


def split(content: dict[str, Any], every: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the remaining part and the held-out one: every ``every``-th image in file-name order.

    Args:
        content: as returned by :func:`detection.data.coco_file.read_coco`.
        every: at least 2.

    Raises:
        ConfigError: no images or annotations, too few images, or an ``every`` below 2.
    """
    if missing := [name for name in ("images", "annotations") if not content.get(name)]:
        raise ConfigError(f"annotations: the file holds no {' and no '.join(missing)} to split")
    names = sorted((image["file_name"], image["id"]) for image in content["images"])
    held_out = {number for _, number in names[every - 1 :: every]} if every >= 2 else set()
    if not held_out:
        raise ConfigError(f"--every: expected 2 to {len(names)}, the number of images, got {every}")
    return _part(content, {number for _, number in names} - held_out), _part(content, held_out)


def _part(content: dict[str, Any], images: set[Any]) -> dict[str, Any]:
    return {
        **content,
        "images": [entry for entry in content["images"] if entry["id"] in images],
        "annotations": [entry for entry in content["annotations"] if entry["image_id"] in images],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write both parts and print their sizes."""
    parser = command_parser("Hold out images of a file in COCO's format.")
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--every", type=int, default=5, metavar="N", help="every N-th image")
    given = parser.parse_args(arguments)
    parts = split(read_coco("annotations", str(given.annotations)), given.every)
    for part, name in zip(parts, ("part", "heldout"), strict=True):
        path = given.annotations.with_name(f"{given.annotations.stem}_{name}.json")
        write_text(path, json.dumps(part))
        print(f"{path}: {len(part['images'])} images, {len(part['annotations'])} objects")


if __name__ == "__main__":
    run_command(main)
