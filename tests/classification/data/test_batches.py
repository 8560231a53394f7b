from __future__ import annotations

import pytest
import torch

from classification.data import ImageSet, training_batches
from classification.data.batches import steps_per_epoch


@pytest.fixture
def numbered():
    """25 images, each of its own number in every pixel; labels are the numbers."""
    numbers = torch.arange(25)
    images = numbers.to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    return ImageSet(images, numbers, tuple(str(n) for n in range(25)))


def epoch(data, cfg, number):
    images, labels = zip(*training_batches(data, cfg, number))
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
    data = ImageSet(ramp, torch.zeros(400, dtype=torch.int64), ("a",))
    images, _ = epoch(data, tiny_config(**{"DATA.FLIP": True, "DATA.CROP_PADDING": 0}), 0)
    mirrored = images[..., 0] > images[..., -1]
    assert 0.4 < mirrored.float().mean() < 0.6
    images, _ = epoch(data, tiny_config(**{"DATA.FLIP": False, "DATA.CROP_PADDING": 0}), 0)
    assert not (images[..., 0] > images[..., -1]).any()


def test_a_set_smaller_than_a_batch_is_refused(numbered, tiny_config):
    with pytest.raises(ValueError, match=r"SOLVER.BATCH_SIZE: 26 is more than the 25 training"):
        steps_per_epoch(numbered, tiny_config(**{"SOLVER.BATCH_SIZE": 26}))
