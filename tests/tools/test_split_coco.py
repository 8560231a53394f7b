"""Images are held out with all that is annotated in them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("detectron2")

from pcka.engine.config import ConfigError
from tools import split_coco

CATEGORIES = [{"id": 7, "name": "cell"}]


def _content(images):
    names = [f"{(3 * number) % images}.png" for number in range(images)]  # not the order of ids
    return {
        "info": {"year": 2018},
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [{"id": n, "image_id": n // 2, "category_id": 7} for n in range(2 * images)],
        "categories": CATEGORIES,
    }


def test_each_third_image_by_name_is_held_out_with_its_objects(tmp_path, capsys):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(_content(8)))
    split_coco.main([str(path), "--every", "3"])
    rest, held_out = (
        json.loads((tmp_path / f"train_{name}.json").read_text()) for name in ("part", "heldout")
    )
    assert {entry["file_name"] for entry in held_out["images"]} == {"2.png", "5.png"}
    for part in (rest, held_out):
        assert part["categories"] == CATEGORIES
        assert part["info"] == {"year": 2018}
        images = [entry["id"] for entry in part["images"]]
        assert [entry["image_id"] for entry in part["annotations"]] == sorted(2 * images)
    assert len(rest["images"]) == 6
    assert "2 images, 4 objects" in capsys.readouterr().out


@pytest.mark.parametrize("every", [0, 1, 5])
def test_a_split_that_leaves_nothing_on_one_side_is_refused(every):
    with pytest.raises(ConfigError, match=rf"--every: expected 2 to 4.*, got {every}"):
        split_coco.split(_content(4), every)


def test_a_file_without_annotations_is_refused():
    with pytest.raises(ConfigError, match="annotations: the file holds no annotations to split"):
        split_coco.split({**_content(4), "annotations": []}, 2)
