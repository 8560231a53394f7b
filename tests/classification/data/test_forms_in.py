"""A folder of images is recognised by what lies in it."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from classification.data.forms import forms_in
from classification.first_run import propose
from pcka.engine.config import ConfigError


def hide(root, *names):
    """Rename folders of classes, so that a table beside them still has its images."""
    for name in names:
        (root / name).rename(root / f"{name}_images")
        for file in root.glob("*.csv"):
            file.write_text(file.read_text().replace(f",{name}/", f",{name}_images/"))


@pytest.fixture(params=["csv", "shards", "saved"])
def alone(written, noisy_root, request):
    """The section DATA of a set that has one form and no other."""
    data = written(request.param).DATA
    hide(noisy_root, "train", "val")
    return data


def test_each_form_is_recognised_in_both_parts(alone):
    assert list(forms_in(alone, "train")) == list(forms_in(alone, "test")) == [alone.NAME]


def test_a_parquet_file_is_a_table_where_it_has_paths_and_the_hubs_otherwise(written, noisy_root):
    data = written("parquet").DATA
    hide(noisy_root, "train", "val")
    assert next(forms_in(data, "train")) == "table"
    data.defrost()
    data.IMAGE_COLUMN = "image"
    assert list(forms_in(data, "train")) == ["huggingface"]


def test_class_folders_come_before_a_table_beside_them(written):
    assert list(forms_in(written("csv").DATA, "train")) == ["folder", "table"]


def test_a_part_of_another_name_tells_the_form(written, noisy_root):
    data = written("csv", **{"DATA.TRAIN_PART": "fold1"}).DATA
    hide(noisy_root, "train")
    assert list(forms_in(data, "train")) == []
    (noisy_root / "train.csv").rename(noisy_root / "fold1.csv")
    assert list(forms_in(data, "train")) == ["table"]


def test_a_first_run_takes_the_form_that_is_there_and_says_so(alone):
    settings, notes = propose(alone.ROOT, "resnet8")
    assert settings["DATA.NAME"] == alone.NAME and "DATA.HOLDOUT" not in settings
    assert notes[0] == f"data: 36 images of 3 classes, DATA.NAME {alone.NAME}"


@pytest.mark.parametrize("form", ["csv", "shards", "saved"])
def test_a_first_run_takes_the_size_of_the_images_in_every_form(written, noisy_root, form):
    for path in noisy_root.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((160, 128)).save(path)
    data = written(form).DATA
    settings, notes = propose(data.ROOT, "resnet8", overrides=["DATA.NAME", data.NAME])
    assert settings["DATA.IMAGE_SIZE"] == 128
    assert "128 (the files' shorter sides have a median of 128)" in notes[1]


def test_a_form_without_a_part_to_test_on_has_some_held_out(written, noisy_root):
    written("shards")
    for split in ("train", "val"):
        shutil.rmtree(noisy_root / split)
    for shard in noisy_root.glob("val-*.tar"):
        shard.unlink()
    settings, notes = propose(noisy_root, "resnet8")
    assert (settings["DATA.NAME"], settings["DATA.HOLDOUT"]) == ("webdataset", 7)
    assert "without a test or val part, 7 of them are held out" in notes[0]


def test_a_folder_of_nothing_known_names_the_other_forms(tmp_path):
    with pytest.raises(ConfigError, match=r"DATA\.NAME table, webdataset or huggingface"):
        propose(tmp_path, "resnet8")
