from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from detection.data.digits import VISIBLE, digits_scenes
from pcka.engine.config import ConfigError

SIDE = 256


def _scenes(root, split="train", number=6):
    annotations, images = digits_scenes(root, split, number, SIDE)
    return json.loads(annotations.read_text()), images


def test_boxes_hold_the_digit_and_nothing_visible_beside_it(tmp_path):
    described, images = _scenes(tmp_path)
    files = {entry["id"]: images / entry["file_name"] for entry in described["images"]}
    assert len(described["annotations"]) >= 4 * len(files)
    for box in described["annotations"]:
        x, y, width, height = box["bbox"]
        picture = np.asarray(Image.open(files[box["image_id"]])).max(axis=2)
        assert x >= 0 and y >= 0 and x + width <= SIDE and y + height <= SIDE
        assert box["area"] == width * height > 0
        inside = picture[y : y + height, x : x + width]
        for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert edge.max() >= VISIBLE / 2  # colours start at half of the digit's grey
        assert inside.max() > 100


def test_boxes_do_not_overlap(tmp_path):
    described, _ = _scenes(tmp_path)
    for entry in described["images"]:
        taken = np.zeros((SIDE, SIDE), dtype=int)
        for box in described["annotations"]:
            if box["image_id"] == entry["id"]:
                x, y, width, height = box["bbox"]
                taken[y : y + height, x : x + width] += 1
        assert taken.max() <= 1


def test_the_same_scenes_for_ever(tmp_path):
    one, images = _scenes(tmp_path / "a")
    other, again = _scenes(tmp_path / "b")
    assert one == other
    for entry in one["images"]:
        assert (images / entry["file_name"]).read_bytes() == (
            again / entry["file_name"]
        ).read_bytes()
    longer, _ = _scenes(tmp_path / "a", number=7)
    assert longer["annotations"][: len(one["annotations"])] == one["annotations"]


def test_every_class_is_a_category_and_the_splits_differ(tmp_path):
    train, _ = _scenes(tmp_path)
    test, _ = _scenes(tmp_path, split="test")
    assert [c["name"] for c in train["categories"]] == [str(digit) for digit in range(10)]
    assert train["annotations"] != test["annotations"]


def test_an_interrupted_set_is_made_again(tmp_path):
    annotations, _ = digits_scenes(tmp_path, "train", 2, SIDE)
    whole = annotations.read_text()
    annotations.unlink()
    assert digits_scenes(tmp_path, "train", 2, SIDE)[0].read_text() == whole


def test_larger_scenes_hold_more_digits_not_larger_ones(tmp_path):
    def boxes(side: int):
        annotations, _ = digits_scenes(tmp_path, "train", 3, side)
        return json.loads(annotations.read_text())["annotations"]

    small, large = boxes(256), boxes(512)
    assert len(large) > 2 * len(small)
    assert max(max(box["bbox"][2:]) for box in large) <= 72


def test_scenes_that_no_digit_fits_into_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"DATASETS.DIGITS.SIDE: expected at least 72, got 64"):
        digits_scenes(tmp_path, "train", 3, 64)
    digits_scenes(tmp_path, "train", 3, 72)
