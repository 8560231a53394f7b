from __future__ import annotations

import json
import shutil
import sys

import pytest

from classification.data import load_image_sets
from pcka.engine.config import ConfigError

datasets = pytest.importorskip("datasets")

RESIDENT = {"DATA.STREAM": False}


@pytest.fixture
def saved(written, noisy_root):
    """``saved(change, **keys)``: the training split as ``change`` makes it of the true one."""

    def write(change, **keys: object):
        cfg = written("saved", **keys)
        folder = noisy_root / "saved" / "train"
        changed = change(datasets.load_from_disk(str(folder)))
        changed.save_to_disk(str(noisy_root / "changed"))
        shutil.rmtree(folder)
        (noisy_root / "changed").rename(folder)
        return cfg

    return write


def test_columns_are_found_by_their_features(saved, noisy_root):
    def renamed(rows):
        return rows.rename_columns({"image": "img", "label": "fine_label"}).add_column(
            "caption", ["x"] * len(rows)
        )

    train, _ = load_image_sets(saved(renamed))
    assert train.labels.bincount().tolist() == [12, 12, 12]


def test_parquet_files_as_the_hub_has_them_are_read(written, noisy_root, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", noisy_root / "cache")
    expected = [one.fingerprint for one in load_image_sets(written("saved"))]
    splits = datasets.load_from_disk(str(noisy_root / "saved"))
    (noisy_root / "hub" / "data").mkdir(parents=True)
    for name, rows in splits.items():
        for number in range(2):
            part = rows.shard(2, number, contiguous=True)
            part.to_parquet(
                str(noisy_root / "hub" / "data" / f"{name}-0000{number}-of-00002.parquet")
            )
    parquet = load_image_sets(written("saved", **{"DATA.ROOT": noisy_root / "hub"}))
    assert [one.fingerprint for one in parquet] == expected


def test_a_set_without_splits_is_trained_on_and_held_out_of(saved, noisy_root):
    cfg = saved(lambda rows: rows, **{"DATA.ROOT": noisy_root / "saved" / "train"})
    with pytest.raises(ConfigError, match=r"expected .*train.test of save_to_disk, .*DATA.HOLDOUT"):
        load_image_sets(cfg)
    cfg.defrost()
    cfg.DATA.HOLDOUT = 9
    assert [len(one) for one in load_image_sets(cfg)] == [27, 9]


def test_labels_of_no_classes_are_read_as_those_of_a_table_are(saved):
    def texts(rows):
        names = rows.features["label"].names
        text = [names[label] for label in rows["label"]]
        return rows.remove_columns("label").add_column("colour", text)

    train, _ = load_image_sets(saved(texts, **{"DATA.LABEL_COLUMN": "colour", "DATA.HOLDOUT": 3}))
    assert train.classes == ("amber", "blue", "red")
    assert train.labels.bincount().tolist() == [11, 11, 11]


def test_an_image_that_the_data_knows_by_its_path_is_read_where_it_lies(
    written, noisy_root, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", noisy_root / "cache")
    expected = [one.fingerprint for one in load_image_sets(written("saved", **RESIDENT))]
    features = datasets.load_from_disk(str(noisy_root / "saved"))["train"].features
    for split in ("train", "val"):
        paths = sorted((noisy_root / split).glob("*/*.png"))
        columns = {"image": list(map(str, paths)), "label": [path.parent.name for path in paths]}
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.to_parquet(str(noisy_root / "paths" / f"{split}.parquet"))
    cfg = written("saved", **{**RESIDENT, "DATA.ROOT": noisy_root / "paths"})
    assert [one.fingerprint for one in load_image_sets(cfg)] == expected
    (noisy_root / "val" / "red" / "01.png").unlink()
    with pytest.raises(ConfigError, match=r"val.parquet, row 7: 'image' holds no image, .*01.png"):
        load_image_sets(cfg)


def _with(column, value, row=1):
    """A change of one entry; images are {"bytes", "path"}."""

    def change(rows):
        feature = rows.features[column]
        undecoded = datasets.Image(decode=False) if column == "image" else datasets.Value("int64")
        rows = rows.cast_column(column, undecoded)
        changed = rows.map(lambda entry, i: {column: value if i == row else entry[column]},
                           with_indices=True)  # fmt: skip
        features = changed.features.copy()
        features[column] = feature
        table = changed.with_format("arrow")[:]
        return datasets.Dataset(table.cast(features.arrow_schema)).cast(features)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _with("image", {"bytes": b"no image", "path": None}),
            r"image '.*saved.train, row 1': can",
        ),
        (_with("image", None), r"saved.train, row 1: 'image' holds no image, nor the path"),
        (_with("label", -1), r"saved.train, row 1: the label -1 in 'label' is not one of its 3"),
        (_with("label", None), r"saved.train, row 1: the label None in 'label' is not one of its"),
        (lambda rows: rows.select([]), r"DATA.ROOT: .*saved.train cannot be read by datasets"),
        (lambda rows: rows.remove_columns("image"), r"IMAGE_COLUMN: .*train has 0 Image columns"),
        (lambda rows: rows.remove_columns("label"), r"LABEL_COLUMN: .* has 0 ClassLabel columns"),
        (
            lambda rows: rows.add_column("coarse", rows["label"], feature=rows.features["label"]),
            r"DATA.LABEL_COLUMN: .*saved.train has 2 ClassLabel columns; name one .*: .*coarse",
        ),
        (
            lambda rows: rows.cast_column("label", datasets.ClassLabel(names=["a", "blue", "red"])),
            r"expected the same classes .*only the training images have 'a' \(first .*train, row 0"
            r"\) and only the evaluation images have 'amber' \(first .*validation, row 0\); c",
        ),
        (
            lambda rows: rows.cast_column(
                "label", datasets.ClassLabel(names=["red", "blue", "amber"])
            ),
            r"expected the same classes and order .*; their order differs",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_row(saved, change, message):
    with pytest.raises(ConfigError, match=message) as refused:
        load_image_sets(saved(change, **RESIDENT))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("key", "name"), [("IMAGE_COLUMN", "pixels"), ("LABEL_COLUMN", "colour")])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(written, key, name):
    cfg = written("saved", **{f"DATA.{key}": name})
    with pytest.raises(ConfigError, match=rf"DATA.{key}: .* has no column '{name}'; .*label \(Cla"):
        load_image_sets(cfg)


def test_a_column_of_no_images_is_refused(written):
    with pytest.raises(ConfigError, match=r"IMAGE_COLUMN: .*'label' is not an image column"):
        load_image_sets(written("saved", **{"DATA.IMAGE_COLUMN": "label"}))


def test_a_damaged_folder_is_named(written, noisy_root):
    cfg = written("saved")
    (noisy_root / "saved" / "train" / "state.json").write_text(json.dumps({})[:1])
    with pytest.raises(ConfigError, match=r"DATA.ROOT: .*saved.train cannot be read by datasets: "):
        load_image_sets(cfg)


def test_a_missing_package_is_named_with_its_extra(written, monkeypatch):
    cfg = written("saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"datasets is not installed; run pip install 'pcka\[d"):
        load_image_sets(cfg)
