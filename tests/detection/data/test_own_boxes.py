"""Sets in the formats of VOC and YOLO, as keys name them: registered, checked and told apart."""

from __future__ import annotations

import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from detection.config import PROJECT
from detection.data import register_datasets
from detection.data.register import FORMATS
from pcka.engine.config import ConfigError

forms = pytest.mark.parametrize("form", ["VOC", "YOLO"])


@pytest.fixture
def configured(small_config, own_keys, tmp_path):
    """``configured(form, root, *overrides)``: the configuration of a run on such a folder."""

    def make(form, root, *more):
        out = ("OUTPUT_DIR", str(tmp_path / "run"))
        return small_config("student", *out, *own_keys(form, root), *more)

    return make


@forms
def test_entries_are_those_of_the_coco_file(configured, own_boxes, small_config, form):
    plain = small_config("student")
    register_datasets(plain)
    cfg = configured(form, own_boxes(form))
    register_datasets(cfg)
    assert (f"{form}_TRAIN",) == cfg.DATASETS.TRAIN
    for ours, theirs in zip((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST),
                            (*plain.DATASETS.TRAIN, *plain.DATASETS.TEST)):  # fmt: skip
        pairs = zip(DatasetCatalog.get(ours), DatasetCatalog.get(theirs), strict=True)
        for one, other in pairs:
            for a, b in zip(one["annotations"], other["annotations"], strict=True):
                assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-6)
                assert a["category_id"] == b["category_id"]
        known = MetadataCatalog.get(ours)
        assert known.thing_classes == MetadataCatalog.get(theirs).thing_classes


@forms
def test_a_set_is_registered_again_from_another_output_folder(configured, own_boxes, form):
    root = own_boxes(form)
    for folder in ("one", "other"):
        register_datasets(configured(form, root, "OUTPUT_DIR", str(root.parent / folder)))
        assert (root.parent / folder / "annotations").is_dir()


@forms
def test_a_name_that_stands_for_another_set_is_refused(configured, own_boxes, form):
    root = own_boxes(form)
    register_datasets(configured(form, root))
    shutil.copytree(root, root.parent / "copy")
    with pytest.raises(ConfigError, match=f"'{form}_TRAIN' is the name of another data set"):
        register_datasets(configured(form, root.parent / "copy"))


@forms
def test_missing_names_and_folders_and_a_second_set_are_refused(configured, own_boxes, form):
    root = own_boxes(form)
    for keys, message in (
        ((f"DATASETS.{form}_TRAIN.NAME", ""), rf"{form}_TRAIN.NAME: give the set a name, e.g. 'my"),
        ((f"DATASETS.{form}_TRAIN.ROOT", "/no"), rf"{form}_TRAIN.ROOT: there is no folder '/no'"),
        ((f"DATASETS.{form}_TRAIN.ROOT", ""), rf"{form}_TRAIN.ROOT: there is no folder ''"),
        (("DATASETS.COCO_TRAIN.NAME", "x"), rf"{form}_TRAIN: DATASETS.COCO_TRAI"),
        (
            ("MODEL.RETINANET.NUM_CLASSES", "3"),
            rf"{form}_TRAIN.ROOT: .* 10 categories, the model 3",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            register_datasets(configured(form, root, *keys))


@forms
def test_files_of_a_set_without_a_name_are_left_alone_where_another_has_one(
    configured, own_boxes, form
):
    cfg = configured(form, own_boxes(form), "DATASETS.COCO_TRAIN.JSON", "/no.json")
    register_datasets(cfg)
    assert (f"{form}_TRAIN",) == cfg.DATASETS.TRAIN


@forms
def test_boxes_are_checked_as_those_of_coco_are(configured, own_boxes, form, caplog):
    root = own_boxes(form)
    for file in (root / "Annotations").glob("train*.xml"):
        text = "<object><name>1</name><bndbox>{}</bndbox></object>".format(
            "".join(f"<{side}>900</{side}>" for side in ("xmin", "ymin", "xmax", "ymax"))
        )
        head, _, _ = file.read_text().partition("<object>")
        file.write_text(f"{head}{text}</annotation>")
    for file in (root / "labels" / "train").glob("*.txt"):
        file.write_text("1 1.0 1.0 0.0 0.0\n")
    with pytest.raises(
        ConfigError, match=rf"{form}_TRAIN.ROOT: .*\(train\): none of its 8 boxes has an area insid"
    ):
        register_datasets(configured(form, root))


def test_the_page_of_formats_names_every_key():
    page = (PROJECT / "docs" / "data.md").read_text()
    keys = {f"{name}_{split}" for name in FORMATS for split in ("TRAIN", "TEST")}
    assert {key for key in keys if key in page} == keys
