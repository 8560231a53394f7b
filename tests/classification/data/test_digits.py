from __future__ import annotations

import zlib

import numpy as np
from fvcore.common.config import CfgNode
from sklearn.datasets import load_digits

from classification.data.digits import TEST_IMAGES, digits_source
from classification.data.image_set import balanced_order


def read_all(split, size=8):
    source = digits_source(CfgNode({"IMAGE_SIZE": size}), split)
    return source.read(np.arange(len(source.labels))), source.labels


def test_the_split_takes_every_image_once():
    (train, train_labels), (test, test_labels) = read_all("train"), read_all("test")
    assert (len(train), len(test)) == (900, 897)
    digits = load_digits()
    pixels = np.concatenate([train[:, 0].numpy(), test[:, 0].numpy()])
    found = zip(map(bytes, pixels), np.concatenate([train_labels, test_labels]))
    expected = zip(map(bytes, np.round(digits.images * 255 / 16).astype(np.uint8)), digits.target)
    assert sorted(found) == sorted(expected)


def test_the_split_is_class_balanced():
    counts = np.bincount(digits_source(CfgNode({"IMAGE_SIZE": 8}), "test").labels)
    assert counts.max() - counts.min() <= 1


def test_the_split_is_this_one_for_ever():
    chosen = balanced_order(load_digits().target.astype(np.int64), 0)[:TEST_IMAGES]
    assert zlib.crc32(np.sort(chosen).astype("<i8").tobytes()) == 994257116


def test_images_are_grey_and_of_the_wanted_size():
    images, _ = read_all("test", 32)
    assert images.shape == (897, 3, 32, 32)
    assert images.max() > 250
    assert (images[:, 0] == images[:, 2]).all()
