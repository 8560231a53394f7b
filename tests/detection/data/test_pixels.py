"""Classes of pixels: of the digits scenes, and of folders of one's own."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from detection.data import register_datasets
from detection.data.digits import PIXEL_CLASSES, digits_scenes
from detection.data.mapper import UnusableImageError, make_mapper
from detection.data.pixels import Labels
from pcka.engine.config import ConfigError

STUDENT = "../digits_pixels/student"
LABELS = Labels(classes=3, ignored=255)


@pytest.fixture
def saved(tmp_path):
    """``saved(values, mode)``: a label image."""

    def make(values, mode="L"):
        image = Image.fromarray(np.array(values, np.uint8))
        if mode == "P":
            image.putpalette([200, 0, 0, *range(3, 256), *range(256), *range(256)])
        image.convert("RGB" if mode == "RGB" else image.mode).save(tmp_path / "label.png")
        return tmp_path / "label.png"

    return make


@pytest.mark.parametrize("mode", ["L", "P"])
def test_label_images_hold_classes_whatever_their_palette(saved, mode):
    values = [[0, 1, 2], [2, 255, 0]]
    assert LABELS.read(saved(values, mode)).tolist() == values


@pytest.mark.parametrize(
    ("values", "mode", "message"),
    [
        ([[0, 1]], "RGB", r"label\.png: expected one class per pixel, .* got RGB colours"),
        (
            [[0, 7, 9]],
            "L",
            r"label\.png: holds the value\(s\) 7, 9; .*from 0 to 2, or 255 for none",
        ),
    ],
)
def test_what_no_model_could_learn_is_named(saved, values, mode, message):
    with pytest.raises(ConfigError, match=message):
        LABELS.read(saved(values, mode))


def test_a_broken_label_image_is_named(tmp_path):
    (tmp_path / "label.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"label\.png: the label image cannot be opened"):
        LABELS.read(tmp_path / "label.png")


def test_the_digits_pixels_are_those_of_the_boxes(scenes):
    annotations, images = digits_scenes(scenes, "train", 3, 128)
    described = json.loads(annotations.read_text())
    for entry in described["images"]:
        pixels = np.asarray(Image.open(annotations.parent / "labels" / entry["file_name"]))
        picture = np.asarray(Image.open(images / entry["file_name"])).max(2)
        rest = pixels.copy()
        for box in described["annotations"]:
            if box["image_id"] == entry["id"]:
                x, y, width, height = box["bbox"]
                window = (slice(y, y + height), slice(x, x + width))
                inside = pixels[window]
                assert set(np.unique(inside)) == {0, box["category_id"]}
                for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                    assert edge.any()
                assert picture[window][inside > 0].mean() > picture[window][inside == 0].mean()
                rest[window] = 0
        assert not rest.any()


def test_scenes_without_classes_of_pixels_are_made_anew(scenes, tmp_path):
    whole, _ = digits_scenes(scenes, "train", 3, 128)
    old = shutil.copytree(whole.parent, tmp_path / whole.parent.name)
    shutil.rmtree(old / "labels")
    again, _ = digits_scenes(tmp_path, "train", 3, 128)
    assert again.read_text() == whole.read_text()
    for path in (whole.parent / "labels").iterdir():
        assert (old / "labels" / path.name).read_bytes() == path.read_bytes()


def test_the_digits_are_a_set_of_pixels_for_a_segmenter(small_config):
    cfg = small_config(STUDENT)
    register_datasets(cfg)
    entries = DatasetCatalog.get("digits_scenes_test")
    assert len(entries) == 4
    assert all("annotations" not in entry for entry in entries)
    known = MetadataCatalog.get("digits_scenes_test")
    assert (known.stuff_classes, known.ignore_label) == (list(PIXEL_CLASSES), 255)
    register_datasets(small_config("student"))  # and again one of boxes
    assert "sem_seg_file_name" not in DatasetCatalog.get("digits_scenes_test")[0]
    with pytest.raises(
        ConfigError, match=r"the pixels have 11 classes, the model 5; .*NUM_CLASSES"
    ):
        register_datasets(small_config(STUDENT, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5"))


@pytest.fixture
def folders(scenes, tmp_path):
    """Folders of four images and their labels, one of them deeper, and names of the classes."""
    annotations, images = digits_scenes(scenes, "test", 4, 128)
    for kind, source in (("images", images), ("truth", annotations.parent / "labels")):
        (tmp_path / kind / "deeper").mkdir(parents=True)
        for number, path in enumerate(sorted(source.iterdir())):
            place = tmp_path / kind / ("deeper" if number == 3 else ".") / path.name
            shutil.copy(path, place)
    (tmp_path / "classes.txt").write_text("\n".join(PIXEL_CLASSES))
    return tmp_path


@pytest.fixture
def own_config(folders, small_config):
    """``own_config(*overrides)``: a segmenter of the folders, to train and to test on."""

    def make(*more, student=STUDENT):
        keys = []
        for split in ("TRAIN", "TEST"):
            values = {
                "NAME": f"own_{split.lower()}",
                "IMAGES": folders / "images",
                "LABELS": folders / "truth",
                "CLASSES": folders / "classes.txt",
            }
            for leaf, value in values.items():
                keys += [f"DATASETS.SEMSEG_{split}.{leaf}", str(value)]
        return small_config(student, *keys, *more)

    yield make
    for name in ("own_train", "own_test"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_folders_of_ones_own_take_the_place_of_the_configured_sets(own_config, folders):
    cfg = own_config()
    register_datasets(cfg)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("own_train",), ("own_test",))
    entries = DatasetCatalog.get("own_train")
    assert [entry["sem_seg_file_name"] for entry in entries] == sorted(
        str(path) for path in (folders / "truth").rglob("*.png")
    )
    assert MetadataCatalog.get("own_test").stuff_classes == list(PIXEL_CLASSES)
    register_datasets(own_config("DATASETS.SEMSEG_TRAIN.CLASSES", "", "DATASETS.TEST", "[]",
                                 "DATASETS.SEMSEG_TEST.NAME", "", "DATASETS.SEMSEG_TEST.IMAGES", "",
                                 "DATASETS.SEMSEG_TEST.LABELS", "",
                                 "DATASETS.SEMSEG_TEST.CLASSES", ""))  # fmt: skip
    assert MetadataCatalog.get("own_train").stuff_classes == list(map(str, range(11)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("TRAIN.IMAGES", "", r"SEMSEG_TRAIN\.IMAGES: there is no folder ''"),
        ("TEST.LABELS", "/nowhere", r"SEMSEG_TEST\.LABELS: there is no folder '/nowhere'"),
        ("TRAIN.CLASSES", "/nowhere", r"SEMSEG_TRAIN\.CLASSES: there is no file '/nowhere'"),
        ("TRAIN.NAME", "", r"SEMSEG_TRAIN\.NAME: give the set a name, e\.g\. 'my_train'"),
        ("TEST.NAME", "coco_2017_val", r"'coco_2017_val' is the name of another data set"),
    ],
)
def test_what_is_missing_is_named(own_config, key, value, message):
    with pytest.raises(ConfigError, match=message):
        register_datasets(own_config(f"DATASETS.SEMSEG_{key}", value))


def test_images_without_labels_or_with_others_are_named(own_config, folders):
    label, empty = folders / "truth" / "000001.png", folders / "empty"
    Image.new("L", (64, 128)).save(label)
    with pytest.raises(ConfigError, match=r"000001\.png: is 64x128 pixels, its image .* 128x128"):
        register_datasets(own_config())
    label.unlink()
    with pytest.raises(ConfigError, match=r"LABELS: 1 of 4 images have no .*first: .*000001\.png"):
        register_datasets(own_config())
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"SEMSEG_TRAIN\.IMAGES: no image \(\.jpg, .*empty"):
        register_datasets(own_config("DATASETS.SEMSEG_TRAIN.IMAGES", str(empty)))


def test_labels_to_test_on_are_read_before_the_training(own_config, folders):
    Image.new("L", (128, 128), 200).save(folders / "truth" / "deeper" / "000003.png")
    with pytest.raises(ConfigError, match=r"000003\.png: holds the value\(s\) 200"):
        register_datasets(own_config(), training=False)


def test_a_set_of_boxes_is_none_for_a_segmenter_nor_one_of_pixels_for_others(
    own_config, small_config
):
    with pytest.raises(ConfigError, match=r"SEMSEG_TRAIN: a RetinaNet learns .*boxes.*COCO_TRAIN"):
        register_datasets(own_config(student="student"))
    keys = ("DATASETS.VOC_TEST.NAME", "boxes")
    with pytest.raises(ConfigError, match=r"VOC_TEST: a SemanticSegmentor .*pixels.*SEMSEG_TEST"):
        register_datasets(small_config(STUDENT, *keys))


def test_crops_are_of_one_size_whatever_the_scale(own_config):
    crop = ("ENABLED", "True"), ("TYPE", "absolute"), ("SIZE", "[64, 96]")
    keys = [word for leaf, value in crop for word in (f"INPUT.CROP.{leaf}", value)]
    cfg = own_config(*keys, "INPUT.MIN_SIZE_TRAIN", "[100, 160]", "INPUT.MAX_SIZE_TRAIN", "400")
    register_datasets(cfg)
    mapper = make_mapper(cfg, training=True)
    for entry in DatasetCatalog.get("own_train") * 2:
        given = mapper(entry)
        assert given["image"].shape == (3, 64, 96)
        assert given["sem_seg"].shape == (64, 96)
        assert given["sem_seg"].dtype == torch.int64
    assert make_mapper(cfg, training=False)(entry)["image"].shape == (3, 128, 128)


def test_the_loader_names_a_label_image_that_it_cannot_take(own_config, folders):
    cfg = own_config()
    register_datasets(cfg)
    (entry, *_) = DatasetCatalog.get("own_train")
    Image.new("L", (128, 128), 77).save(entry["sem_seg_file_name"])
    with pytest.raises(UnusableImageError, match=r"000000\.png: .*holds the value\(s\) 77"):
        make_mapper(cfg, training=True)(entry)
