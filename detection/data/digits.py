"""Scenes of handwritten digits with exact boxes and pixel labels; no download is needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pcka.engine.config import ConfigError
from pcka.engine.run_folder import write_text

SPLIT_SEEDS = {"train": 0, "test": 1}
FIRST_TEST_DIGIT = 900  # of 1,797: training and test scenes have no digit in common
HIGHEST_VALUE = 16  # scikit-learn's pixel values are 0..16
DIGIT_SIDES = (20, 72)  # pixels
DIGITS_PER_AREA = (4, 12)  # per AREA square pixels
AREA = 256**2
VISIBLE = 40  # grey value from which a pixel counts as part of the digit
TRIES = 30
LABELS = "labels"  # folder of the label images, next to that of the images
PIXEL_CLASSES = ("background", *map(str, range(10)))  # by pixel value: digit + 1


def digits_scenes(root: Path, split: str, scenes: int, side: int) -> tuple[Path, Path]:
    """Return the annotation file and the image folder; create them if missing.

    The folder ``labels`` next to them holds the class of each pixel (``PIXEL_CLASSES``), in an
    image of the same name. The scenes depend only on (split, side, scene number). The annotations
    are written last, so that an interrupted run leaves nothing that looks complete.

    Args:
        root: folder of all sets.
        split: "train" or "test"; they use different handwritten digits.
        scenes: number of images.
        side: side of the square images in pixels. Larger scenes hold more digits, not larger ones.

    Raises:
        ConfigError: the scenes are too small for the largest digit.
    """
    if side < DIGIT_SIDES[1]:
        raise ConfigError(f"DATASETS.DIGITS.SIDE: expected at least {DIGIT_SIDES[1]}, got {side}")
    folder = root / f"{split}_{scenes}x{side}"
    annotations = folder / "annotations.json"
    images, labels = folder / "images", folder / LABELS
    if not labels.is_dir():
        annotations.unlink(missing_ok=True)
    if not annotations.exists():
        for each in (images, labels):
            each.mkdir(parents=True, exist_ok=True)
        described = _write_scenes(folder, split, scenes, side)
        write_text(annotations, json.dumps(described))
    return annotations, images


def _write_scenes(folder: Path, split: str, scenes: int, side: int) -> dict[str, list[dict]]:
    """Write the pictures and return their description in COCO's format."""
    digits = load_digits()
    test = np.arange(len(digits.target)) >= FIRST_TEST_DIGIT
    chosen = test if split == "test" else ~test
    pictures, labels = digits.images[chosen], digits.target[chosen]
    entries: list[dict] = []
    boxes: list[dict] = []
    for scene in range(scenes):
        generator = np.random.RandomState([SPLIT_SEEDS[split], side, scene])
        canvas, pixels, found = _draw_scene(generator, pictures, labels, side)
        name = f"{scene:06d}.png"
        Image.fromarray(canvas).save(folder / "images" / name)
        Image.fromarray(pixels).save(folder / LABELS / name)
        entries.append({"id": scene + 1, "file_name": name, "width": side, "height": side})
        for label, (x, y, width, height) in found:
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": scene + 1,
                    "category_id": label + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    return {"images": entries, "annotations": boxes, "categories": categories}


def _draw_scene(
    generator: np.random.RandomState, pictures: np.ndarray, labels: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """Scatter digits over a noisy canvas; boxes are (x, y, width, height) and do not overlap.

    Returns:
        The canvas ``(side, side, 3)``, the classes of its pixels ``(side, side)``, both uint8, and
        the digits with their boxes.
    """
    canvas = generator.randint(0, 60, (side, side, 3)).astype(np.float32)
    taken = np.zeros((side, side), dtype=bool)
    pixels = np.zeros((side, side), dtype=np.uint8)
    found = []
    for _ in range(max(1, generator.randint(*DIGITS_PER_AREA) * side**2 // AREA)):
        index = generator.randint(len(labels))
        digit = _resized(pictures[index], generator.randint(*DIGIT_SIDES))
        colour = generator.uniform(0.5, 1.0, 3)
        for _ in range(TRIES):
            x, y = generator.randint(0, side - len(digit), 2)
            window = (slice(y, y + len(digit)), slice(x, x + len(digit)))
            if not taken[window].any():
                taken[window] = True
                canvas[window] = np.maximum(canvas[window], digit[..., None] * colour)
                pixels[window][digit >= VISIBLE] = labels[index] + 1
                found.append((int(labels[index]), _visible_box(digit, x, y)))
                break
    return canvas.astype(np.uint8), pixels, found


def _resized(picture: np.ndarray, side: int) -> np.ndarray:
    grey = Image.fromarray((picture * (255 / HIGHEST_VALUE)).astype(np.uint8))
    return np.asarray(grey.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32)


def _visible_box(digit: np.ndarray, x: int, y: int) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(digit >= VISIBLE)
    left, top = int(columns.min()), int(rows.min())
    width, height = int(columns.max()) + 1 - left, int(rows.max()) + 1 - top
    return int(x) + left, int(y) + top, width, height
