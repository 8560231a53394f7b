from __future__ import annotations

import pickle

import numpy as np
import pytest
from fvcore.common.config import CfgNode
from torchvision.datasets import CIFAR10

from classification.data.cifar import cifar_source


def section(root, name="cifar10", **keys):
    return CfgNode({"NAME": name, "ROOT": str(root), "IMAGE_SIZE": 32, "DOWNLOAD": False, **keys})


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_data_says_how_to_get_it(tmp_path, name):
    with pytest.raises(ValueError, match=f"no complete {name} in .* set DATA.DOWNLOAD True"):
        cifar_source(section(tmp_path, name), "train")


def test_another_image_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cifar10 has images of 32 pixels, got 64"):
        cifar_source(section(tmp_path, IMAGE_SIZE=64), "train")


def test_pixels_and_labels_are_those_of_the_files(tmp_path, monkeypatch):
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(256, size=(4, 3072), dtype=np.uint8)
    entry = {"data": pixels, "labels": [3, 1, 2, 0]}
    (folder / "test_batch").write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcd")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    source = cifar_source(section(tmp_path), "test")
    assert source.labels.tolist() == [3, 1, 2, 0]
    images = source.read(np.array([2, 0]))
    assert (images.numpy() == pixels[[2, 0]].reshape(2, 3, 32, 32)).all()
