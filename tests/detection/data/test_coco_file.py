"""Annotation files that would fail, or teach nothing, in the middle of a run."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from detection.data.coco_file import DamagedFileError, check_coco, read_coco


@pytest.fixture
def check(tmp_path):
    """``check(change, evaluated=)``: two images with an object each, altered by ``change``."""

    def make(change, *, evaluated=False):
        content = {
            "images": [
                {"id": number, "file_name": name, "width": 40, "height": 30}
                for number, name in ((1, "a.png"), (2, "b.png"))
            ],
            "annotations": [
                {"id": number, "image_id": number, "category_id": 7, "bbox": [5, 5, 10, 10],
                 "area": 100, "iscrowd": 0}
                for number in (1, 2)
            ],
            "categories": [{"id": 7, "name": "cat"}],
        }  # fmt: skip
        for name in ("a.png", "b.png"):
            Image.new("RGB", (40, 30)).save(tmp_path / name)
        change(content)
        path = tmp_path / "own.json"
        path.write_text(json.dumps(content))
        read = read_coco("KEY", str(path))
        check_coco("KEY", str(path), read, str(tmp_path), evaluated=evaluated)

    return make


def _set(part, name, value):
    return lambda content: content[part][1].update({name: value})


def _drop(part, name):
    return lambda content: content[part][1].pop(name)


def _category(**entry):
    return lambda content: content["categories"].append({"name": "dog", **entry})


BOX = "has a bbox that is not four finite numbers"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set("annotations", "bbox", [1, 2, 3]),
            rf"1 of its annotations .* first {BOX}.*\"id\": 2",
        ),
        (_set("annotations", "bbox", None), BOX),
        (_set("annotations", "bbox", list("1234")), BOX),
        (_set("annotations", "bbox", [1, 1, math.nan, 4]), BOX),
        (_set("annotations", "bbox", [1, 1, math.inf, 4]), BOX),
        (_drop("annotations", "bbox"), "has no bbox"),
        (_set("annotations", "bbox", [9, 9, -4, 4]), "negative width or height"),
        (_set("annotations", "category_id", 9999), r"not in categories \(9999\)"),
        (_set("annotations", "category_id", [7]), "has an id that is neither a whole number nor"),
        (_set("annotations", "id", 1), "annotations: 1 duplicate ids, the first is 1"),
        (_set("images", "id", 1), "images: 1 duplicate ids, the first is 1"),
        (_drop("images", "width"), "1 of its images cannot be used; the first has no width"),
        (_drop("images", "file_name"), "has no file_name"),
        (_drop("images", "id"), "has no id"),
        (_set("images", "file_name", None), "an invalid file_name"),
        (_set("images", "height", 0), "a width or height below 1"),
        (_set("images", "file_name", "c.png"), r"1 of its 2 images are not in .*: c\.png"),
        (lambda content: content.update(images=None), "expected a list of images, got null"),
        (lambda content: content.update(annotations=None), "a list of annotations, got null"),
        (lambda content: content.update(annotations=[3]), "the first is not an object: 3"),
        (lambda content: content["categories"].append({"id": 7, "name": "dog"}), "duplicate ids"),
        (_category(id=[8]), r"1 of its categories .* neither a whole number nor text: .*\[8\]"),
        (_category(id="8"), "categories: some ids are numbers and some are text; use numbers"),
        (lambda content: content["categories"].append({"id": 8}), "the first has no name"),
        (lambda content: content["categories"].append(8), "the first is not an object: 8"),
    ],
)
def test_what_would_fail_later_is_named_with_its_file(check, change, message):
    for evaluated in (False, True):
        with pytest.raises(DamagedFileError, match=rf"^KEY: .*own\.json.*{message}"):
            check(change, evaluated=evaluated)


@pytest.mark.parametrize("field", ["area", "iscrowd"])
def test_an_evaluation_asks_for_more(check, field):
    check(_drop("annotations", field))
    with pytest.raises(DamagedFileError, match=f"the first has no {field}"):
        check(_drop("annotations", field), evaluated=True)


def test_a_test_set_may_keep_its_truth_to_itself(check):
    check(lambda content: content.pop("annotations"), evaluated=True)
    with pytest.raises(DamagedFileError, match="a list of annotations"):
        check(lambda content: content.pop("annotations"))


@pytest.mark.parametrize("box", [[50, 5, 10, 10], [5, 5, 0, 10], [-20, 5, 10, 10], [5, 30, 9, 9]])
def test_boxes_without_an_area_in_their_image_are_told(check, caplog, box):
    check(_set("annotations", "bbox", box))
    assert "1 of its 2 boxes have no area inside their image" in caplog.text
    assert "b.png" in caplog.text
    assert "a.png" not in caplog.text


def test_a_set_of_such_boxes_alone_is_refused_to_train_on(check):
    def outside(content):
        for entry in content["annotations"]:
            entry["bbox"] = [100, 100, 10, 10]

    with pytest.raises(DamagedFileError, match="none of its 2 boxes has an area inside its image"):
        check(outside)
    check(outside, evaluated=True)


def test_boxes_that_reach_out_of_their_image_are_as_good_as_others(check, caplog):
    check(_set("annotations", "bbox", [-5, 20, 100, 100]))
    assert not caplog.text
