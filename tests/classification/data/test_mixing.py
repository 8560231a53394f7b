"""Mixup and cutmix beside their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from classification.data import Batch
from classification.data.mixing import Mixture, mix, mixtures

MIXUP, CUTMIX = {"DATA.MIXUP": 0.8}, {"DATA.CUTMIX": 1.0}
SIDE = 16


@pytest.fixture
def batch():
    images = torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.tensor([0, 3, 1, 1, 2, 0]), torch.arange(6) + 10)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixup_averages_neighbours_and_their_targets(batch, share):
    images, targets, indices = mix(batch, Mixture(share), classes=4)
    one_hot = np.eye(4)[batch.labels.numpy()]
    for i, j in enumerate([1, 0, 3, 2, 5, 4]):
        image = share * batch.images[i] + (1 - share) * batch.images[j]
        target = share * one_hot[i] + (1 - share) * one_hot[j]
        torch.testing.assert_close(images[i], image)
        torch.testing.assert_close(targets[i], torch.tensor(target, dtype=torch.float32))
    assert torch.equal(indices, batch.indices)


def test_cutmix_takes_a_box_of_the_neighbour_and_leaves_the_batch_alone(batch):
    before = batch.images.clone()
    images, targets, _ = mix(batch, Mixture(0.75, (2, 10, 4, 12)), classes=4)
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[2:10, 4:12] = True
    for i, j in enumerate([1, 0, 3, 2, 5, 4]):
        assert torch.equal(images[i], torch.where(inside, before[j], before[i]))
    assert targets[0].tolist() == [0.75, 0, 0, 0.25]
    assert targets[2].tolist() == [0, 1, 0, 0]  # both of one class
    assert torch.equal(batch.images, before)


def test_the_shares_of_mixup_are_beta_distributed(tiny_config):
    cfg = tiny_config(**MIXUP)
    drawn = list(mixtures(cfg, 0, 4000))
    assert all(mixture.box is None for mixture in drawn)
    assert stats.kstest([m.share for m in drawn], stats.beta(0.8, 0.8).cdf).pvalue > 0.01


def test_a_box_of_cutmix_has_the_neighbours_share_around_its_centre(tiny_config):
    cfg = tiny_config(**CUTMIX)
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((cfg.SEED, 3, 6))))
    for mixture in mixtures(cfg, 3, 200):
        random.random_sample()
        length = np.floor(SIDE * np.sqrt(1 - random.beta(1.0, 1.0)))
        edges = [
            edge.clip(0, SIDE)
            for centre in random.randint(SIDE, size=2)
            for edge in (centre - length // 2, centre - length // 2 + length)
        ]
        assert mixture.box == tuple(edges)


def test_the_share_of_cutmix_is_that_of_the_pixels_that_remain(tiny_config, batch):
    for mixture in mixtures(tiny_config(**CUTMIX), 0, 100):
        own = torch.ones(2, 3, SIDE, SIDE)
        own[1] = 0
        cut = mix(Batch(own, torch.tensor([0, 1]), torch.arange(2)), mixture, classes=2)
        assert cut.images[0].mean().item() == pytest.approx(mixture.share)
        assert cut.labels[0].tolist() == pytest.approx([mixture.share, 1 - mixture.share])


def test_each_batch_takes_one_of_the_two_where_both_are_wanted(tiny_config):
    drawn = list(mixtures(tiny_config(**MIXUP, **CUTMIX), 0, 1000))
    assert 450 < sum(mixture.box is None for mixture in drawn) < 550


def test_mixtures_follow_seed_and_epoch_alone(tiny_config):
    cfg = tiny_config(**MIXUP, **CUTMIX)
    drawn = list(mixtures(cfg, 2, 10))
    np.random.seed(1)
    torch.manual_seed(1)
    assert list(mixtures(cfg, 2, 10)) == drawn
    assert list(mixtures(cfg, 1, 10)) != drawn
    assert list(mixtures(tiny_config(SEED=1, **MIXUP, **CUTMIX), 2, 10)) != drawn
