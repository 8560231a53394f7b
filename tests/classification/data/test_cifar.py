from __future__ import annotations

import pickle

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from classification.data.cifar import cifar_source


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_data_says_how_to_get_it(tmp_path, name):
    with pytest.raises(ValueError, match=f"no complete {name} in .* set DATA.DOWNLOAD True"):
        cifar_source(name, str(tmp_path), "train", 32, download=False)


def test_another_image_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cifar10 has images of 32 pixels, got 64"):
        cifar_source("cifar10", str(tmp_path), "train", 64, download=False)


def test_pixels_and_labels_are_those_of_the_files(tmp_path, monkeypatch):
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(256, size=(4, 3072), dtype=np.uint8)
    entry = {"data": pixels, "labels": [3, 1, 2, 0]}
    (folder / "test_batch").write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcd")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    source = cifar_source("cifar10", str(tmp_path), "test", 32, download=False)
    assert source.labels.tolist() == [3, 1, 2, 0]
    images = source.read(np.array([2, 0]))
    assert (images.numpy() == pixels[[2, 0]].reshape(2, 3, 32, 32)).all()
