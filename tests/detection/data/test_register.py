from __future__ import annotations

import json

import pytest
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts

from detection.config import ConfigError
from detection.data import register_datasets
from detection.data.digits import digits_scenes


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


def test_missing_files_are_named(small_config, scenes):
    with pytest.raises(ConfigError, match=r"DATASETS.COCO_TRAIN.JSON: '/no.json' does not exist"):
        register_datasets(_own_set(small_config, scenes, "missing", JSON="/no.json"))


def test_a_name_that_detectron2_uses_is_refused(small_config, scenes):
    with pytest.raises(ConfigError, match="'coco_2017_train' is the name of another data set"):
        register_datasets(_own_set(small_config, scenes, "coco_2017_train"))


def test_an_unknown_set_is_refused(small_config):
    with pytest.raises(ConfigError, match="no data set is called 'nope'"):
        register_datasets(small_config("student", "DATASETS.TRAIN", "['nope']"))


def test_another_number_of_classes_is_refused(small_config, scenes, tmp_path):
    annotations, _ = digits_scenes(scenes, "train", 3, 128)
    described = json.loads(annotations.read_text())
    described["categories"] = described["categories"][:3]
    path = tmp_path / "three.json"
    path.write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"has 3 categories, the model 10 classes"):
        register_datasets(_own_set(small_config, scenes, "three", JSON=str(path)))
