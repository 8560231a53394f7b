from __future__ import annotations

import sys

import pytest
import torch

from classification.data import load_evaluation_set, load_image_sets
from pcka.engine.config import ConfigError


@pytest.fixture
def table(written, noisy_root):
    """``table(text, **keys)``: the training table is this text."""

    def write(text: str, **keys: object):
        cfg = written("csv", **keys)
        (noisy_root / "train.csv").write_text(text, encoding="utf-8")
        return cfg

    return write


ROWS = "train/amber/00.png,amber\ntrain/blue/00.png,blue\ntrain/red/00.png,red\n"


def test_columns_and_files_may_have_other_names(table, noisy_root):
    keys = {"IMAGE_COLUMN": "file", "LABEL_COLUMN": "colour", "TRAIN_PART": "folds/one.csv"}
    cfg = table("", **{f"DATA.{key}": value for key, value in keys.items()})
    (noisy_root / "folds").mkdir()
    rows = ROWS.replace("train/", "../train/")  # relative to the table
    (noisy_root / "folds" / "one.csv").write_text(
        "file,other,colour\n" + rows.replace(".png,", ".png,x,")
    )
    (noisy_root / "val.csv").write_text("colour,file\nred,val/red/00.png\n")
    with pytest.raises(ConfigError, match=r"same classes .*the training images have 'amber' \("):
        load_image_sets(cfg)
    (noisy_root / "classes.txt").write_text("amber\nblue\nred\n")
    train, test = load_image_sets(cfg)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2], [2])


def test_a_test_table_that_lacks_a_class_is_read_by_the_file_of_classes(table, noisy_root):
    cfg = table(f"path,label\n{ROWS}")
    (noisy_root / "val.csv").write_text("path,label\nval/red/00.png,red\n")
    (noisy_root / "classes.txt").write_text("red\nblue\namber\n")
    assert load_evaluation_set(cfg).labels.tolist() == [0]
    assert load_image_sets(cfg)[0].labels.tolist() == [2, 1, 0]


def test_a_byte_order_mark_quotes_and_empty_lines_are_read(table, noisy_root):
    (noisy_root / "train" / "red" / "00.png").rename(noisy_root / "train" / "red, dark.png")
    rows = ROWS.replace("train/red/00.png", '"train/red, dark.png"').replace("\n", "\r\n\r\n")
    train, _ = load_image_sets(table(f"\ufeffpath,label\r\n{rows}"))
    assert train.labels.tolist() == [0, 1, 2]


def test_an_absolute_path_and_a_table_of_absolute_name_are_read(table, noisy_root):
    rows = ROWS.replace("train/", f"{noisy_root}/train/")
    cfg = table(f"path,label\n{rows}", **{"DATA.TRAIN_PART": noisy_root / "train.csv"})
    assert len(load_image_sets(cfg)[0]) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"DATA.IMAGE_COLUMN: .*train.csv has no column 'path'"),
        (
            "file,label\n",
            r"DATA.IMAGE_COLUMN: .*train.csv has no column 'path'; known: file, label",
        ),
        ("path,class\n", r"DATA.LABEL_COLUMN: .*train.csv has no column 'label'; known: path, cl"),
        ("path;label\n", r"has no column 'path'; known: path;label"),
        ("path,label\n", r"DATA.ROOT: .*train.csv has no rows"),
        (f"path,label\n{ROWS}no.png,red\n", r"train.csv, line 5: there is no file 'no.png' in "),
        (f"path,label\n{ROWS}train,red\n", r"train.csv, line 5: there is no file 'train' in "),
        (f"path,label\n{ROWS}\n,red\n", r"train.csv, line 6: has no image path"),
        (f"path,label\n{ROWS}val/red/00.png,\n", r"train.csv, line 5: the image has no label"),
        (f"path,label\n{ROWS}a,b,c\n", r"train.csv, line 5: has 3 fields, the header 2; quote"),
        (f"path,label\n{ROWS}a\n", r"train.csv, line 5: has 1 fields, the header 2"),
        (f'path,label\n{ROWS}"a"b,c\n', r"train.csv, line 5: not valid CSV: "),
        (f"path,label\n{ROWS}val/red/00.png,green\n", r"only .* have .green. \(first .*00.png\)"),
    ],
)
def test_what_is_wrong_with_a_table_is_named_with_its_line(table, text, message):
    with pytest.raises(ConfigError, match=message) as refused:
        load_image_sets(table(text))
    assert "\n" not in str(refused.value)


def test_an_unknown_label_is_named_with_its_line(table, noisy_root):
    (noisy_root / "classes.txt").write_text("amber\nblue\n")
    with pytest.raises(
        ConfigError, match=r"train.csv, line 4: the label 'red' is not one of the 2"
    ):
        load_image_sets(table(f"path,label\n{ROWS}"))


def test_another_encoding_is_refused(table, noisy_root):
    cfg = table("")
    (noisy_root / "train.csv").write_bytes("path,label\ngrün.png,grün\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"train.csv: cannot be read as UTF-8 text"):
        load_image_sets(cfg)


def test_a_missing_table_says_what_is_looked_for(written, noisy_root):
    cfg = written("csv")
    (noisy_root / "val.csv").unlink()
    with pytest.raises(
        ConfigError,
        match=r"expected the table .*test or .*val or .*validation, a file .csv or .parquet, found "
        r"none; DATA.TEST_PART names another, and DATA.HOLDOUT evaluates on training images",
    ):
        load_image_sets(cfg)


@pytest.mark.parametrize("stream", [False, True])
def test_an_image_that_cannot_be_decoded_is_named(written, noisy_root, stream):
    cfg = written("csv", **{"DATA.STREAM": stream, "SOLVER.BATCH_SIZE": 36})
    (noisy_root / "train" / "blue" / "03.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"cannot decode the image '.*train.blue.03\.png'"):
        list(load_image_sets(cfg)[0].training_batches(cfg, 0))


def test_a_parquet_table_names_its_column_and_row(written, noisy_root):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cfg = written("parquet")

    def write(**columns):
        parquet.write_table(pyarrow.table(columns), noisy_root / "train.parquet")

    for columns, message in (
        ({"file": ["a"], "label": [1]}, r"DATA.IMAGE_COLUMN: .*has no column 'path'; known: file"),
        ({"path": ["val/red/00.png", "a"], "label": [1, 2]}, r"parquet, row 1: there is no file"),
        ({"path": ["val/red/00.png", None], "label": [1, 2]}, r"parquet, row 1: has no image path"),
        ({"path": ["val/red/00.png"], "label": [None]}, r"parquet, row 0: the image has no label"),
        ({"path": ["val/red/00.png"], "label": [0.5]}, r"parquet, row 0: the label 0.5 is neither"),
        ({"path": [], "label": []}, r"DATA.ROOT: .*train.parquet has no rows"),
    ):
        write(**columns)
        with pytest.raises(ConfigError, match=message):
            load_image_sets(cfg)
    (noisy_root / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=r"train.parquet: cannot be read as Parquet: "):
        load_image_sets(cfg)


def test_whole_numbers_of_a_parquet_table_are_classes(written, noisy_root):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cfg = written("parquet")
    for name in ("train", "val"):
        paths = [f"train/red/{number:02}.png" for number in range(12)]
        columns = {"path": paths, "label": list(range(12))}
        parquet.write_table(pyarrow.table(columns), noisy_root / f"{name}.parquet")
    train, _ = load_image_sets(cfg)
    assert torch.equal(train.labels, torch.arange(12))  # by number: "10" is after "9"


def test_a_missing_package_is_named_with_its_extra(written, monkeypatch):
    cfg = written("parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        ImportError, match=r"pyarrow is not installed; run pip install 'pcka\[parquet\]"
    ):
        load_image_sets(cfg)
