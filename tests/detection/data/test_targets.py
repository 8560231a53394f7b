"""Data that lacks what a student learns or is evaluated by."""

from __future__ import annotations

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from detection.data.targets import check_test_sets, training_set
from pcka.engine.config import ConfigError


@pytest.fixture
def own_set(tmp_path):
    """``own_set(entry, metadata)``: register a set of one image under the name "a_set"."""

    def make(entry, **metadata):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        given = {"file_name": str(tmp_path / "a.png"), "height": 8, "width": 8, "image_id": 1}
        DatasetCatalog.register("a_set", lambda: [{**given, **entry}])
        MetadataCatalog.get("a_set").set(**metadata)

    yield make
    if "a_set" in DatasetCatalog.list():
        DatasetCatalog.remove("a_set")
    MetadataCatalog.remove("a_set")


@pytest.fixture
def config(small_config):
    """``config(architecture, *overrides)``: a student on the set "a_set"."""
    sets = ("DATASETS.TRAIN", "['a_set']", "DATASETS.TEST", "['a_set']")
    return lambda architecture, *more: small_config(
        "student", "MODEL.META_ARCHITECTURE", architecture, *sets, *more
    )


BOXED = {"annotations": [{"bbox": [1, 1, 4, 4], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}]}


@pytest.mark.parametrize("architecture", ["SemanticSegmentor", "PanopticFPN"])
def test_students_of_pixels_need_their_classes(own_set, config, architecture):
    own_set(BOXED)
    message = rf"a {architecture} needs a class for every pixel, and 1 of 1 images.*a\.png"
    with pytest.raises(ConfigError, match=f"DATASETS.TRAIN: {message}"):
        training_set(config(architecture))
    with pytest.raises(ConfigError, match=f"DATASETS.TEST: 'a_set': {message}"):
        check_test_sets(config(architecture))
    assert training_set(config("RetinaNet"))


def test_pixels_without_names_of_their_classes_cannot_be_evaluated(own_set, config, tmp_path):
    own_set({"sem_seg_file_name": str(tmp_path / "a.png")})
    with pytest.raises(ConfigError, match="has no stuff_classes and ignore_label"):
        check_test_sets(config("SemanticSegmentor"))
    MetadataCatalog.get("a_set").set(stuff_classes=["a"], ignore_label=255)
    check_test_sets(config("SemanticSegmentor"))


def test_students_of_masks_need_masks(own_set, config):
    own_set(BOXED)
    with pytest.raises(ConfigError, match=r"MODEL.MASK_ON: in 1 of 1 images.*a\.png.*to False"):
        training_set(config("GeneralizedRCNN", "MODEL.MASK_ON", "True"))
    assert training_set(config("GeneralizedRCNN", "MODEL.MASK_ON", "False"))
    assert training_set(config("RetinaNet", "MODEL.MASK_ON", "True"))  # has no use for them


def test_sigmas_fit_the_keypoints_of_the_test_set(own_set, config):
    own_set(BOXED, keypoint_names=["nose", "tail"])
    keys = ("MODEL.KEYPOINT_ON", "True")
    with pytest.raises(ConfigError, match=r"have 2 keypoints, .* sigmas for 17 \(of COCO\)"):
        check_test_sets(config("GeneralizedRCNN", *keys))
    check_test_sets(config("GeneralizedRCNN", *keys, "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1]"))


def test_data_without_keypoints_is_named(own_set, config):
    own_set(BOXED)
    with pytest.raises(ConfigError, match=r"DATASETS.TRAIN, with at least 1 keypoints per image"):
        training_set(config("GeneralizedRCNN", "MODEL.KEYPOINT_ON", "True"))


def test_a_test_set_that_cannot_be_read_is_named(own_set, config):
    own_set({"file_name": "/nowhere/a.png"})
    with pytest.raises(ConfigError, match=r"DATASETS.TEST: 'a_set': there is no image '/nowhere"):
        check_test_sets(config("RetinaNet"))
    DatasetCatalog.remove("a_set")
    DatasetCatalog.register("a_set", lambda: {}["width"])
    with pytest.raises(ConfigError, match=r"DATASETS.TEST: 'a_set': width"):
        check_test_sets(config("RetinaNet"))
    DatasetCatalog.remove("a_set")
    DatasetCatalog.register("a_set", list)
    with pytest.raises(ConfigError, match=r"DATASETS.TEST: 'a_set' has no images"):
        check_test_sets(config("RetinaNet"))


def test_a_set_to_test_on_that_is_named_twice_is_refused(config):
    with pytest.raises(
        ConfigError, match=r"DATASETS.TEST: expected each set once, got \['a_set', "
    ):
        check_test_sets(config("RetinaNet", "DATASETS.TEST", "['a_set', 'a_set']"))
