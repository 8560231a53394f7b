from __future__ import annotations

import numpy as np

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
