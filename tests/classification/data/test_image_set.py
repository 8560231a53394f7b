from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from classification.data import ImageSet
from classification.data.image_set import balanced_order


def test_every_prefix_of_a_balanced_order_is_balanced():
    labels = np.random.RandomState(1).permutation(np.repeat([0, 1, 2], [20, 5, 9]))
    order = balanced_order(labels, seed=0)
    assert sorted(order) == list(range(34))
    for length in range(1, 16):  # while the smallest class lasts
        counts = np.bincount(labels[order[:length]], minlength=3)
        assert counts.max() - counts.min() <= 1


def test_a_balanced_order_is_shuffled_by_its_seed():
    labels = np.zeros(50, dtype=np.int64)
    order = balanced_order(labels, seed=0)
    assert (order == balanced_order(labels, seed=0)).all()
    assert not (order == balanced_order(labels, seed=1)).all()
    assert not (order == np.arange(50)).all()


def test_the_fingerprint_sees_pixels_labels_and_classes():
    data = ImageSet(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.arange(4), tuple("abcd"))
    pixels = data.images.clone()
    pixels[3, 2, 1, 1] = 1
    others = [
        replace(data, images=pixels),
        replace(data, labels=data.labels.flip(0)),
        replace(data, classes=tuple("abce")),
    ]
    assert replace(data, images=data.images.clone()).fingerprint == data.fingerprint
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 4
