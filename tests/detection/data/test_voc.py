from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from detection.data.digits import digits_scenes
from detection.data.voc import read_voc
from pcka.engine.config import ConfigError


@pytest.fixture
def root(own_boxes):
    return own_boxes("VOC")


def read(root, split="train"):
    return read_voc("DATASETS.VOC_TRAIN.ROOT", root, split)


@pytest.mark.parametrize(
    ("split", "of_digits", "images"), [("train", "train", 8), ("val", "test", 4)]
)
def test_boxes_are_those_of_the_coco_file(root, scenes, split, of_digits, images):
    annotations, _ = digits_scenes(scenes, of_digits, images, 128)
    expected, found = json.loads(annotations.read_text()), read(root, split).content
    assert found["annotations"] == expected["annotations"]
    assert found["categories"] == expected["categories"]
    for ours, theirs in zip(found["images"], expected["images"], strict=True):
        assert ours == {**theirs, "file_name": f"{split}_{theirs['file_name']}"}


def edit(root, old, new, name="train_000001"):
    """Replace the first place of a text in a file of boxes."""
    file = root / "Annotations" / f"{name}.xml"
    text = file.read_text()
    assert re.search(old, text)
    file.write_text(re.sub(old, new, text, count=1))


def test_difficult_objects_are_neither_learnt_nor_counted(root):
    edit(root, "<difficult>0", "<difficult>1")
    found = [box for box in read(root).boxes if box["image_id"] == 2]
    assert [box["iscrowd"] for box in found] == [1] + [0] * (len(found) - 1)


def test_the_size_of_an_image_is_read_where_the_file_states_none(root):
    edit(root, "<size>.*</size>", "<size><width>0</width></size>")
    image = Image.open(root / "JPEGImages" / "train_000001.png").resize((120, 100))
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    image.save(root / "JPEGImages" / "train_000001.png", exif=exif)
    entry = read(root).images[1]
    assert (entry["width"], entry["height"]) == (100, 120)


def test_classes_that_nobody_names_are_those_of_all_splits_in_alphabetical_order(root):
    named = read(root)
    (root / "classes.txt").unlink()
    edit(root, "<name>.*?<", "<name>zebra<", "val_000000")
    train, val = read(root), read(root, "val")
    assert train.classes == val.classes
    assert sorted(train.classes) == list(train.classes)
    assert train.classes[-1] == "zebra"
    for ours, theirs in zip(train.boxes, named.boxes, strict=True):
        assert train.classes[ours["category_id"] - 1] == named.classes[theirs["category_id"] - 1]


def test_an_image_without_objects_is_one(root):
    edit(root, "<object>.*</object>", "")
    found = read(root)
    assert len(found.images) == 8
    assert 2 not in {box["image_id"] for box in found.boxes}


FILE = r"Annotations.train_000001\.xml"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<name>.*?</name>", "", rf"{FILE}: object 1: has no <name>"),
        ("<xmin>.*?</xmin>", "", rf"{FILE}: object 1: its <xmin> in <bndbox>: .* got None"),
        ("<ymax>.*?<", "<ymax>nan<", rf"{FILE}: object 1: its <ymax> .* finite number, got 'nan'"),
        ("<ymax>.*?<", "<ymax>a<", rf"{FILE}: object 1: its <ymax> .* got 'a'"),
        ("<xmax>.*?<", "<xmax>0<", rf"{FILE}: object 1: its box ends before it begins"),
        ("</annotation>", "", rf"{FILE}: cannot be read as XML: "),
    ],
)
def test_a_broken_object_is_named_with_its_file(root, old, new, message):
    edit(root, old, new)
    with pytest.raises(ConfigError, match=message):
        read(root)


def test_an_unknown_class_is_named_with_its_file(root):
    edit(root, "<name>.*?</name>", "<name>cat</name>")
    with pytest.raises(ConfigError, match=rf"{FILE}: object 1: 'cat' is not one of the 10 classes"):
        read(root)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no\n", r"train.txt, line 9: there is no image 'no' with a suffix \(.jpg, .*JPEGImages"),
        ("train_000000\n", r"train.txt, line 9: 'train_000000' is already on line 1"),
        ("bare\n", r"train.txt, line 9: there is no .*Annotations.bare.xml; an image without"),
    ],
)
def test_a_broken_list_is_named_with_its_line(root, line, message):
    Image.new("RGB", (9, 9)).save(root / "JPEGImages" / "bare.png")
    with (root / "ImageSets" / "Main" / "train.txt").open("a") as listing:
        listing.write(line)
    with pytest.raises(ConfigError, match=message):
        read(root)


def test_missing_folders_lists_and_images_are_named(root):
    with pytest.raises(ConfigError, match=r"VOC_TRAIN.ROOT: expected the file .*dev.txt .*SPLIT$"):
        read(root, "dev")
    (root / "ImageSets" / "Main" / "dev.txt").write_text("\n")
    with pytest.raises(ConfigError, match=r"VOC_TRAIN.ROOT: .*dev.txt lists no images"):
        read(root, "dev")
    (root / "Annotations").rename(root / "annotations")
    with pytest.raises(ConfigError, match=r"VOC_TRAIN.ROOT: expected the folder .*Annotations"):
        read(root)


def test_a_broken_image_of_unknown_size_is_named(root):
    edit(root, "<size>.*</size>", "")
    (root / "JPEGImages" / "train_000001.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"train_000001.png: the image cannot be opened: "):
        read(root)
