from __future__ import annotations

import numpy as np
import pytest
import torch

from classification.data import ResidentSet, crop_and_flip, steps_per_epoch


@pytest.fixture
def numbered():
    """25 images, each of its own number in every pixel; labels are the numbers."""
    numbers = torch.arange(25)
    images = numbers.to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    return ResidentSet(images, numbers, tuple(str(n) for n in range(25)))


def epoch(data, cfg, number, **share):
    """Images and labels of one epoch, each (steps, b, ...); labels are the indices as well."""
    images, labels, indices = zip(*data.training_batches(cfg, number, **share))
    assert torch.equal(torch.stack(labels), torch.stack(indices))
    return torch.stack(images), torch.stack(labels)


def test_an_epoch_holds_distinct_images_with_their_labels(numbered, tiny_config):
    cfg = tiny_config(**{"DATA.CROP_PADDING": 0})
    images, labels = epoch(numbered, cfg, 0)
    assert images.shape == (2, 10, 3, 8, 8)  # the 5 images left over are left out
    assert images.dtype == torch.float32
    assert len(set(labels.flatten().tolist())) == 20
    assert torch.equal(images, (labels / 255)[..., None, None, None].expand(images.shape))


def test_order_and_augmentation_follow_seed_and_epoch_alone(numbered, tiny_config):
    cfg = tiny_config()
    first_images, first_labels = epoch(numbered, cfg, 0)
    torch.manual_seed(99)  # the global stream has no part in it
    again_images, again_labels = epoch(numbered, tiny_config("rcka"), 0)
    assert torch.equal(first_images, again_images)
    assert torch.equal(first_labels, again_labels)
    assert not torch.equal(first_labels, epoch(numbered, cfg, 1)[1])
    assert not torch.equal(first_labels, epoch(numbered, tiny_config(SEED=1), 0)[1])


def test_order_and_augmentation_are_streams_of_their_own(numbered, tiny_config):
    plain = epoch(numbered, tiny_config(**{"DATA.CROP_PADDING": 0}), 0)
    cropped = epoch(numbered, tiny_config(**{"DATA.CROP_PADDING": 3}), 0)
    assert torch.equal(plain[1], cropped[1])
    assert not torch.equal(plain[0], cropped[0])


def test_flips_come_in_about_half_of_the_images(tiny_config):
    ramp = torch.arange(8, dtype=torch.uint8).expand(400, 3, 8, 8).contiguous()
    data = ResidentSet(ramp, torch.zeros(400, dtype=torch.int64), ("a",))
    cfg = tiny_config(**{"DATA.FLIP": True, "DATA.CROP_PADDING": 0})
    images = torch.stack([batch.images for batch in data.training_batches(cfg, 0)])
    mirrored = images[..., 0] > images[..., -1]
    assert 0.4 < mirrored.float().mean() < 0.6
    cfg = tiny_config(**{"DATA.FLIP": False, "DATA.CROP_PADDING": 0})
    images = torch.stack([batch.images for batch in data.training_batches(cfg, 0)])
    assert not (images[..., 0] > images[..., -1]).any()


def stream(*purpose):
    (seed,) = np.random.SeedSequence(purpose).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed))


def test_the_streams_are_the_ones_that_kept_runs_were_made_with(numbered, tiny_config):
    cfg = tiny_config(SEED=4, **{"DATA.CROP_PADDING": 4, "DATA.FLIP": True})
    images, labels = epoch(numbered, cfg, 3)
    order = torch.randperm(25, generator=stream(4, 3, 0))
    assert labels.flatten().tolist() == order[:20].tolist()
    augmentation = stream(4, 3, 1)
    offsets = torch.randint(9, (25, 2), generator=augmentation)
    flipped = torch.rand(25, generator=augmentation) < 0.5
    cut = crop_and_flip(numbered.images[order], offsets, flipped, 4)[:20]
    assert torch.equal(images.flatten(0, 1), cut / 255)


@pytest.mark.parametrize("world_size", [2, 5])
def test_the_parts_of_all_processes_are_the_batches_of_one(numbered, tiny_config, world_size):
    cfg = tiny_config()
    parts = [epoch(numbered, cfg, 0, rank=r, world_size=world_size) for r in range(world_size)]
    for whole, of_all in zip(epoch(numbered, cfg, 0), zip(*parts)):
        assert of_all[0].shape[1] == 10 // world_size
        assert torch.equal(whole, torch.cat(of_all, dim=1))


def test_the_processes_evaluate_every_image_once(numbered):
    seen = [list(numbered.evaluation_batches(4, rank, 3)) for rank in range(3)]
    indices = [torch.cat([batch.indices for batch in batches]) for batches in seen]
    assert [len(batch.labels) for batch in seen[0]] == [4, 4, 1]
    for rank, (own, batches) in enumerate(zip(indices, seen)):
        assert own.tolist() == list(range(rank, 25, 3))
        assert torch.equal(torch.cat([batch.labels for batch in batches]), own)
        images = torch.cat([batch.images for batch in batches])
        assert torch.equal(images[:, 0, 0, 0], own / 255)


def test_more_processes_than_images_leave_some_without(numbered):
    few = numbered.subset(torch.tensor([7, 2]))
    assert few.labels.tolist() == [7, 2]
    assert [len(list(few.evaluation_batches(4, rank, 3))) for rank in range(3)] == [1, 1, 0]


@pytest.mark.parametrize(("world_size", "next_larger"), [(3, 12), (16, 16)])
def test_a_batch_that_the_processes_cannot_share_is_refused(
    numbered, tiny_config, world_size, next_larger
):
    cfg = tiny_config()
    expected = rf"SOLVER.BATCH_SIZE: expected a multiple of {world_size}, .* 10; use {next_larger}"
    with pytest.raises(ValueError, match=expected):
        steps_per_epoch(numbered, cfg, world_size)
    with pytest.raises(ValueError, match=expected):
        next(numbered.training_batches(cfg, 0, 0, world_size))


def test_batches_that_make_no_whole_update_are_left_out(numbered, tiny_config):
    cfg = tiny_config(**{"SOLVER.BATCH_SIZE": 4, "SOLVER.ACCUMULATE": 4})
    assert steps_per_epoch(numbered, cfg) == len(list(numbered.training_batches(cfg, 0))) == 4
    cfg = tiny_config(**{"SOLVER.BATCH_SIZE": 4, "SOLVER.ACCUMULATE": 7})
    expected = r"SOLVER.BATCH_SIZE times SOLVER.ACCUMULATE: 28 is more than the 25 training"
    with pytest.raises(ValueError, match=expected):
        steps_per_epoch(numbered, cfg)


def test_a_set_smaller_than_a_batch_is_refused(numbered, tiny_config):
    with pytest.raises(ValueError, match=r"SOLVER.BATCH_SIZE: 26 is more than the 25 training"):
        steps_per_epoch(numbered, tiny_config(**{"SOLVER.BATCH_SIZE": 26}))
