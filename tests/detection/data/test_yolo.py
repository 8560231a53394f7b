from __future__ import annotations

import json

import pytest
from PIL import Image

from detection.data.digits import digits_scenes
from detection.data.yolo import read_yolo
from pcka.engine.config import ConfigError


@pytest.fixture
def root(own_boxes):
    return own_boxes("YOLO")


def read(root, split="train"):
    return read_yolo("DATASETS.YOLO_TRAIN.ROOT", root, split)


@pytest.mark.parametrize(
    ("split", "of_digits", "images"), [("train", "train", 8), ("val", "test", 4)]
)
def test_boxes_are_those_of_the_coco_file(root, scenes, split, of_digits, images):
    annotations, _ = digits_scenes(scenes, of_digits, images, 128)
    expected, found = json.loads(annotations.read_text()), read(root, split).content
    assert found["categories"] == expected["categories"]
    for ours, theirs in zip(found["annotations"], expected["annotations"], strict=True):
        assert ours.pop("bbox") == pytest.approx(theirs.pop("bbox"), abs=1e-6)
        assert ours.pop("area") == pytest.approx(theirs.pop("area"), abs=1e-3)
        assert ours == theirs
    for ours, theirs in zip(found["images"], expected["images"], strict=True):
        assert ours == {**theirs, "file_name": f"images/{split}/{theirs['file_name']}"}


def test_a_folder_needs_no_yaml_file(root):
    expected = read(root).content
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("\n".join("0123456789"))
    assert read(root).content == expected


def test_the_yaml_file_may_have_any_name_and_state_another_folder(root):
    expected = read(root).content
    text = (root / "data.yaml").read_text()
    (root / "data.yaml").unlink()
    elsewhere = root.parent / "digits.yml"
    elsewhere.write_text(f"path: {root.name}\nnc: 10\n{text}")
    assert read(elsewhere).content == expected


@pytest.mark.parametrize("place", ["[images/train, images/val]", "both.txt", "../images"])
def test_a_split_may_be_several_folders_a_list_or_roboflows(root, place):
    content = (root / "data.yaml").read_text().replace("train: images/train", f"train: {place}")
    (root / "data.yaml").write_text(content)
    images = sorted(root.rglob("*.png"))
    (root / "both.txt").write_text("\n".join(f"./{image.relative_to(root)}" for image in images))
    assert [entry["file_name"] for entry in read(root).images] == [
        str(image.relative_to(root)) for image in images
    ]


def test_boxes_are_parts_of_the_image_as_its_exif_turns_it(root):
    image = root / "images" / "train" / "000000.png"
    exif = Image.Exif()
    exif[274] = 8
    Image.new("RGB", (100, 50)).save(image, exif=exif)
    (root / "labels" / "train" / "000000.txt").write_text("3 0.5 0.5 0.5 0.2\n")
    found = read(root)
    assert (found.images[0]["width"], found.images[0]["height"]) == (50, 100)
    assert found.boxes[0]["bbox"] == [12.5, 40, 25, 20]


def test_an_image_without_a_file_of_labels_has_no_objects(root, caplog):
    (root / "labels" / "train" / "000001.txt").unlink()
    (root / "labels" / "train" / "000002.txt").write_text("\n")
    found = read(root)
    assert len(found.images) == 8
    assert not {2, 3} & {box["image_id"] for box in found.boxes}
    assert "1 of the 8 images have no label file" in caplog.text
    assert "000001.txt)" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3 0.5 0.5 0.5", r"expected 5 numbers \(class, center x, .*\), got 4"),
        ("3 0.5 0.5 0.5 0.5 0.5 0.5", r"expected 5 numbers .*, got 7"),
        ("3 0.5 0.5 nan 0.5", r"width: expected a finite number, got 'nan'"),
        ("3 0.5 x 0.5 0.5", r"center y: expected a finite number, got 'x'"),
        ("10 0.5 0.5 0.5 0.5", r"the class 10 is not one of the 10, counted from 0"),
        ("-1 0.5 0.5 0.5 0.5", r"the class -1 is not one of the 10"),
        ("1.5 0.5 0.5 0.5 0.5", r"the class 1.5 is not one of the 10"),
        (
            "3 64 64 20 20",
            r"expected fractions of the image's .*, from 0 to 1, got '3 64 64 20 20'",
        ),
        ("3 0.5 0.5 -0.1 0.5", r"expected fractions of the image's sides, from 0 to 1"),
    ],
)
def test_a_broken_line_is_named(root, line, message):
    (root / "labels" / "train" / "000001.txt").write_text(f"3 0.5 0.5 0.5 0.5\n\n{line}\n")
    with pytest.raises(ConfigError, match=rf"labels.train.000001\.txt, line 3: {message}"):
        read(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("val: images/val\nnames: [a]", r"expected a folder .* as 'train', got None; .*SPLIT$"),
        ("train: 3\nnames: [a]", r"expected a folder or a list of folders as 'train', got \[?3"),
        ("train: images/train", r"data.yaml: expected the classes as 'names', .* got None"),
        ("train: images/train\nnames: [a, a]", r"without duplicates, got \['a', 'a'\]"),
        ("train: images/train\nnames: {1: a, 2: b}", r"a mapping from 0, 1, …"),
        ("train: images/train\nnames: [a]\nnc: 2", r"has 1 names, but 'nc' is 2"),
        ("train: images/no\nnames: [a]", r"there is no image folder '.*images/no'"),
        ("train: labels\nnames: [a]", r"there is no image \(.jpg, .* in .*labels"),
        ("train: no.txt\nnames: [a]", r"no.txt, line 1: there is no image '.*no.png'"),
        ("train: [", r"data.yaml: cannot be read as YAML"),
    ],
)
def test_what_is_wrong_with_the_yaml_file_is_named(root, content, message):
    (root / "data.yaml").write_text(content)
    (root / "no.txt").write_text("no.png\n")
    with pytest.raises(ConfigError, match=message):
        read(root)


def test_what_has_neither_yaml_nor_classes_is_refused(root):
    (root / "data.yaml").unlink()
    with pytest.raises(ConfigError, match=r"YOLO_TRAIN.ROOT: expected .*data.yaml, or .*classes"):
        read(root)


def test_images_without_any_labels_are_refused(root):
    (root / "labels" / "train").rename(root / "boxes")
    with pytest.raises(
        ConfigError, match=r"none of the 8 images has a label file; that of .*labels.train.*txt"
    ):
        read(root)


def test_a_broken_image_is_named(root):
    (root / "images" / "train" / "000001.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"train.000001.png: the image cannot be opened: "):
        read(root)
