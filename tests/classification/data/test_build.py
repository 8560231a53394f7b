from __future__ import annotations

import pytest
import torch

from classification.data import load_evaluation_set, load_image_sets


def rows(data):
    return {bytes(image.numpy()) for image in data.images}


def test_held_out_images_are_not_trained_on_and_the_test_images_not_touched(tiny_config):
    train, held_out = load_image_sets(tiny_config(**{"DATA.TRAIN_IMAGES": 0, "DATA.HOLDOUT": 100}))
    _, test = load_image_sets(tiny_config(**{"DATA.TRAIN_IMAGES": 0, "DATA.HOLDOUT": 0}))
    assert (len(train), len(held_out), len(test)) == (800, 100, 897)
    assert held_out.labels.bincount().tolist() == [10] * 10
    assert not rows(train) & rows(held_out)
    assert not rows(test) & (rows(train) | rows(held_out))


def test_a_subset_is_balanced_and_depends_on_its_own_seed_alone(tiny_config):
    train, _ = load_image_sets(tiny_config())
    assert train.labels.bincount().tolist() == [4] * 10
    assert load_image_sets(tiny_config(SEED=7))[0].fingerprint == train.fingerprint
    other, _ = load_image_sets(tiny_config(**{"DATA.SPLIT_SEED": 7}))
    assert other.fingerprint != train.fingerprint


@pytest.mark.parametrize("holdout", [0, 30])
def test_evaluation_alone_reads_the_same_images(tiny_config, holdout):
    cfg = tiny_config(**{"DATA.HOLDOUT": holdout})
    alone, beside = load_evaluation_set(cfg), load_image_sets(cfg)[1]
    assert torch.equal(alone.images, beside.images)
    assert torch.equal(alone.labels, beside.labels)


def test_another_class_count_is_refused_with_both(tiny_config):
    with pytest.raises(ValueError, match="100 classes are configured, the data has 10"):
        load_image_sets(tiny_config(**{"DATA.NUM_CLASSES": 100}))


def test_more_images_than_there_are_are_refused(tiny_config):
    with pytest.raises(ValueError, match=r"800 [+] 200 images are requested, .* has 900"):
        load_image_sets(tiny_config(**{"DATA.HOLDOUT": 800, "DATA.TRAIN_IMAGES": 200}))
