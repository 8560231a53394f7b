from __future__ import annotations

import json
import shutil

import pytest
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.data.detection_utils import create_keypoint_hflip_indices

from detection.data import register_datasets
from detection.data.digits import digits_scenes
from pcka.engine.config import ConfigError


def _own_set(small_config, scenes, name, **changes):
    annotations, images = digits_scenes(scenes, "train", 3, 128)
    values = {"NAME": name, "JSON": str(annotations), "IMAGES": str(images), **changes}
    overrides = [word for key, v in values.items() for word in (f"DATASETS.COCO_TRAIN.{key}", v)]
    return small_config("student", *overrides)


def test_digits_scenes_are_made_and_registered(small_config):
    cfg = small_config("student")
    register_datasets(cfg)
    assert len(get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=False)) == 8
    register_datasets(cfg)  # a second time is harmless


def test_a_set_of_three_keys_takes_the_place_of_the_configured_one(small_config, scenes):
    cfg = _own_set(small_config, scenes, "mine")
    register_datasets(cfg)
    assert cfg.DATASETS.TRAIN == ("mine",)
    entries = DatasetCatalog.get("mine")
    assert len(entries) == 3
    assert {"file_name", "annotations", "image_id"} <= entries[0].keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JSON": "/no.json"}, r"COCO_TRAIN.JSON: there is no file '/no.json'"),
        ({"JSON": ""}, r"COCO_TRAIN.JSON: there is no file ''"),
        ({"IMAGES": ""}, r"COCO_TRAIN.IMAGES: there is no folder ''"),
        ({"NAME": ""}, r"COCO_TRAIN.NAME: give the set a name, e.g. 'my_train'"),
    ],
)
def test_missing_files_and_names_are_named(small_config, scenes, changes, message):
    with pytest.raises(ConfigError, match=message):
        register_datasets(_own_set(small_config, scenes, "missing", **changes))


def test_the_missing_file_of_a_set_of_detectron2_is_named(small_config):
    cfg = small_config("student", "DATASETS.TEST", "['coco_2017_val']")
    with pytest.raises(ConfigError, match=r"DATASETS.TEST: 'coco_2017_val' needs the file .*json"):
        register_datasets(cfg)


def test_training_sets_are_needed_for_training_alone(small_config):
    cfg = small_config("student", "DATASETS.TRAIN", "[]")
    with pytest.raises(ConfigError, match=r"DATASETS.TRAIN: expected at least one set"):
        register_datasets(cfg)
    register_datasets(cfg, training=False)
    register_datasets(small_config("student", "DATASETS.TRAIN", "['nope']"), training=False)


def test_a_name_that_detectron2_uses_is_refused(small_config, scenes):
    with pytest.raises(ConfigError, match="'coco_2017_train' is the name of another data set"):
        register_datasets(_own_set(small_config, scenes, "coco_2017_train"))


def test_an_unknown_set_is_refused(small_config):
    with pytest.raises(ConfigError, match="no data set is called 'nope'"):
        register_datasets(small_config("student", "DATASETS.TRAIN", "['nope']"))


@pytest.fixture
def described(scenes, tmp_path):
    """``described(change)``: a file of digits scenes, whose content ``change`` alters."""

    def make(change):
        annotations, _ = digits_scenes(scenes, "train", 3, 128)
        content = json.loads(annotations.read_text())
        path = tmp_path / "described.json"
        path.write_text(json.dumps(change(content)))
        return str(path)

    return make


def test_another_number_of_classes_is_refused(small_config, scenes, described):
    path = described(lambda content: {**content, "categories": content["categories"][:3]})
    with pytest.raises(ConfigError, match=r"3 categories, .* set MODEL\.RETINANET\.NUM_CLASSES 3"):
        register_datasets(_own_set(small_config, scenes, "three", JSON=path))
    with pytest.raises(ConfigError, match=r"has 10 categories, the model 9 classes"):
        register_datasets(small_config("student", "MODEL.RETINANET.NUM_CLASSES", "9"))


def test_other_classes_to_test_on_are_refused(small_config, scenes, described):
    names = [{"id": index, "name": f"class {index}"} for index in range(10)]
    path = described(lambda content: {**content, "categories": names})
    with pytest.raises(
        ConfigError, match=r"'own' and 'digits_scenes_test' have different categories"
    ):
        register_datasets(_own_set(small_config, scenes, "own", JSON=path))


@pytest.mark.parametrize(
    "change",
    [lambda content: [], lambda content: {"images": []}, lambda content: {"categories": None}],
    ids=["no object", "no categories", "null categories"],
)
def test_a_file_of_another_format_is_refused(small_config, scenes, described, change):
    with pytest.raises(ConfigError, match=r"described.json is not in COCO's format"):
        register_datasets(_own_set(small_config, scenes, "odd", JSON=described(change)))


def test_keypoints_keep_their_names_and_what_a_flip_exchanges(small_config, scenes, described):
    def with_keypoints(content):
        first, *others = content["categories"]
        own = {**first, "keypoints": ["nose", "left_eye", "right_eye"]}
        return {**content, "categories": [own, *others]}

    cfg = _own_set(small_config, scenes, "pose", JSON=described(with_keypoints))
    cfg.DATASETS.TEST = ()
    register_datasets(cfg)
    assert create_keypoint_hflip_indices("pose") == [0, 2, 1]


def test_test_sets_are_checked_before_the_training(small_config, scenes, described):
    def without_area(content):
        objects = [{k: v for k, v in a.items() if k != "area"} for a in content["annotations"]]
        return {**content, "annotations": objects}

    _, images = digits_scenes(scenes, "train", 3, 128)
    path = described(without_area)
    values = {"NAME": "late", "JSON": path, "IMAGES": str(images)}
    for split, refused in (("TRAIN", False), ("TEST", True)):
        keys = [w for k, v in values.items() for w in (f"DATASETS.COCO_{split}.{k}", v)]
        cfg = small_config("student", *keys)
        if not refused:
            register_datasets(cfg)
            continue
        with pytest.raises(ConfigError, match=r"COCO_TEST.JSON: .*the first has no area"):
            register_datasets(cfg)


@pytest.mark.parametrize("emptied", ["annotations", "image"])
def test_damaged_digits_scenes_say_how_they_are_made_anew(small_config, tmp_path, emptied):
    cfg = small_config("student", "DATASETS.DIGITS.ROOT", str(tmp_path))
    register_datasets(cfg)
    if emptied == "annotations":
        (tmp_path / "train_8x128" / "annotations.json").write_text("")
    else:
        (tmp_path / "train_8x128" / "images" / "000000.png").unlink()
    with pytest.raises(ConfigError, match=r"DATASETS.DIGITS: .*remove the folder '.*train_8x128'"):
        register_datasets(cfg)
    shutil.rmtree(tmp_path / "train_8x128")
    register_datasets(cfg)
