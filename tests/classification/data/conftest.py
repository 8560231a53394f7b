"""Image files so few and small that a test may stream them, in every form that they may have."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from classification.config import load_config

CLASSES = ("amber", "blue", "red")
TRAINING_IMAGES, TEST_IMAGES = 12, 3  # of each class


@pytest.fixture
def noisy_root(tmp_path):
    """A class-per-folder set of noise, 40 x 30 pixels; no two images are alike."""
    generator = np.random.RandomState(0)
    for split, images in (("train", TRAINING_IMAGES), ("val", TEST_IMAGES)):
        for name in CLASSES:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = generator.randint(256, size=(30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return tmp_path


def listed(root: Path, split: str) -> list[tuple[Path, str]]:
    """The images of a folder's part and their classes, in the folder's order."""
    return [(path, path.parent.name) for path in sorted((root / split).glob("*/*"))]


def write_table(root: Path) -> None:
    """``train.csv`` and ``val.csv`` beside the folders."""
    for split in ("train", "val"):
        with (root / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["label", "path"])
            rows.writerows([label, path.relative_to(root)] for path, label in listed(root, split))


def write_parquet_table(root: Path) -> None:
    """``train.parquet`` and ``val.parquet`` beside the folders."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for split in ("train", "val"):
        paths, labels = zip(*listed(root, split))
        columns = {"path": [str(path.relative_to(root)) for path in paths], "label": list(labels)}
        parquet.write_table(pyarrow.table(columns), root / f"{split}.parquet")


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Put a file into a shard."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shards(root: Path) -> None:
    """Shards of ten samples, ``train-000.tar``, …, beside the folders."""
    for split in ("train", "val"):
        images = listed(root, split)
        for start in range(0, len(images), 10):
            with tarfile.open(root / f"{split}-{start // 10:03}.tar", "w") as archive:
                for number, (path, label) in enumerate(images[start : start + 10]):
                    add_member(archive, f"{number:04}.png", path.read_bytes())
                    add_member(archive, f"{number:04}.cls", label.encode())


def write_saved(root: Path) -> None:
    """``train`` and ``validation`` of a ``DatasetDict`` in the folder ``saved``."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES))
    )
    splits = {}
    for split, name in (("train", "train"), ("val", "validation")):
        paths, labels = zip(*listed(root, split))
        content = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
        columns = {"image": content, "label": list(labels)}
        splits[name] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(root / "saved")


# DATA.NAME, the folder within the root, and what writes the data there.
FORMS = {
    "csv": ("table", ".", write_table),
    "parquet": ("table", ".", write_parquet_table),
    "shards": ("webdataset", ".", write_shards),
    "saved": ("huggingface", "saved", write_saved),
}


@pytest.fixture
def streaming_config(noisy_root):
    """The configuration of a streaming run on these; further keys by their dotted names."""

    def config(**keys: object):
        values = {
            "STUDENT.NAME": "resnet8",
            "DATA.NAME": "folder",
            "DATA.ROOT": noisy_root,
            "DATA.IMAGE_SIZE": 16,
            "DATA.STREAM": True,
            "DATA.WORKERS": 0,
            "SOLVER.BATCH_SIZE": 8,
            **keys,
        }
        return load_config(None, [str(word) for pair in values.items() for word in pair])

    return config


@pytest.fixture
def written(noisy_root, streaming_config):
    """``written(form, **keys)``: the images in a form of ``FORMS``, as a configuration names it."""

    def write(form: str, **keys: object):
        name, folder, write_it = FORMS[form]
        write_it(noisy_root)
        place = {"DATA.NAME": name, "DATA.ROOT": noisy_root / folder}
        return streaming_config(**{**place, **keys})

    return write
