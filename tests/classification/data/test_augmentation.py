"""What is done to whole batches: random erasing, and all of it by seed, epoch and image alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from classification.config import load_config
from classification.data import ResidentSet, load_image_sets, steps_per_epoch
from classification.data.augmentation import augmented_batches, erase, erasing_boxes
from pcka.engine.config import ConfigError

SIDE = 16
ALL = {
    "DATA.RANDAUGMENT": [2, 9], "DATA.ERASING": 0.5, "DATA.MIXUP": 0.8, "DATA.CUTMIX": 1.0,
    "SOLVER.BATCH_SIZE": 12,
}  # fmt: skip


@pytest.fixture
def noise():
    """30 images of 3 classes."""
    images = torch.randint(
        256, (30, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return ResidentSet(images, torch.arange(30) % 3, ("a", "b", "c"))


@pytest.fixture
def streaming(tmp_path):
    """``streaming(**KEYS)``: the configuration of a set of 24 image files of 2 classes."""
    pixels = np.random.default_rng(0).integers(256, size=(24, 20, 24, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        folder = tmp_path / ("train" if i < 20 else "test") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")

    def config(**keys):
        values = {
            "STUDENT.NAME": "resnet8", "DATA.NAME": "folder", "DATA.ROOT": tmp_path,
            "DATA.IMAGE_SIZE": SIDE, "DATA.STREAM": True, "DATA.WORKERS": 0, **ALL,
            "SOLVER.BATCH_SIZE": 4, **keys,
        }  # fmt: skip
        return load_config(None, [str(word) for pair in values.items() for word in pair])

    return config


def epoch(data, cfg, number, **share):
    """Images, targets and indices of one epoch, each (steps, b, ...)."""
    return [torch.stack(part) for part in zip(*augmented_batches(data, cfg, number, **share))]


def same(ours, theirs):
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_parts_of_all_processes_are_the_batches_of_one(noise, tiny_config, world_size):
    cfg = tiny_config(**ALL)
    parts = [epoch(noise, cfg, 1, rank=r, world_size=world_size) for r in range(world_size)]
    joined = [torch.cat(of_all, dim=1) for of_all in zip(*parts)]
    whole = epoch(noise, cfg, 1)
    assert whole[0].shape == (2, 12, 3, SIDE, SIDE) and whole[1].shape == (2, 12, 3)
    # An operation on more images at once may round a convolution's sums in another order.
    torch.testing.assert_close(joined[0], whole[0], rtol=0, atol=1e-6)
    assert same(joined[1:], whole[1:])


def test_augmentation_follows_seed_and_epoch_alone(noise, tiny_config):
    cfg = tiny_config(**ALL)
    first = epoch(noise, cfg, 1)
    torch.manual_seed(99)
    np.random.seed(99)
    assert same(epoch(noise, tiny_config("rcka", **ALL), 1), first)
    assert not torch.equal(epoch(noise, cfg, 2)[1], first[1])
    assert not torch.equal(epoch(noise, tiny_config(SEED=1, **ALL), 1)[1], first[1])


@pytest.mark.parametrize("key", ["DATA.RANDAUGMENT", "DATA.ERASING"])
def test_what_is_done_to_an_image_does_not_depend_on_the_size_of_the_batches(
    noise, tiny_config, key
):
    of_four, of_twelve = (
        epoch(noise, tiny_config(**{key: ALL[key], "SOLVER.BATCH_SIZE": size}), 0)[0].flatten(0, 1)
        for size in (4, 12)
    )
    torch.testing.assert_close(of_four[:24], of_twelve, rtol=0, atol=1e-6)


@pytest.mark.parametrize("key", ["DATA.RANDAUGMENT", "DATA.ERASING", "DATA.MIXUP"])
def test_each_kind_draws_from_a_stream_of_its_own(noise, tiny_config, key):
    """The images that one of them leaves alone are what they are without it."""
    cfg = tiny_config(**{"SOLVER.BATCH_SIZE": 12})
    plain = epoch(noise, cfg, 0)
    state = torch.random.get_rng_state()
    changed = epoch(noise, tiny_config(**{"SOLVER.BATCH_SIZE": 12, key: ALL[key]}), 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(changed[2], plain[2])
    assert not torch.equal(changed[0], plain[0])
    if key == "DATA.ERASING":
        kept = (changed[0] == plain[0]).flatten(2).all(2)
        assert 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize("workers", [1, 2])
def test_streams_are_augmented_alike_whatever_the_number_of_workers(streaming, workers):
    cfg = streaming()
    train, _ = load_image_sets(cfg)
    images, targets, _ = whole = epoch(train, cfg, 1)
    assert images.shape == (5, 4, 3, SIDE, SIDE) and targets.shape == (5, 4, 2)
    torch.testing.assert_close(targets.sum(2), torch.ones(5, 4))
    assert images.min() >= 0 and images.max() <= 1
    assert not torch.equal(images, epoch(train, streaming(**{"DATA.RANDAUGMENT": []}), 1)[0])
    by_workers = streaming(**{"DATA.WORKERS": workers})
    assert same(epoch(load_image_sets(by_workers)[0], by_workers, 1), whole)


def test_without_a_key_the_batches_are_those_of_the_set(noise, tiny_config):
    cfg = tiny_config()
    plain = [torch.stack(part) for part in zip(*noise.training_batches(cfg, 0))]
    assert same(epoch(noise, cfg, 0), plain)
    assert plain[1].dtype == torch.int64


@pytest.mark.parametrize(("world_size", "size", "wanted"), [(1, 5, 6), (2, 10, 12), (3, 9, 12)])
def test_pairs_that_the_processes_cannot_make_are_refused(
    noise, tiny_config, world_size, size, wanted
):
    cfg = tiny_config(**{"DATA.CUTMIX": 1.0, "SOLVER.BATCH_SIZE": size})
    message = rf"SOLVER.BATCH_SIZE: expected a multiple of {2 * world_size}, .* use {wanted}"
    with pytest.raises(ConfigError, match=message):
        steps_per_epoch(noise, cfg, world_size)


def test_boxes_have_the_published_areas_and_shapes():
    side = 1000  # so large that rounding hardly counts
    boxes = erasing_boxes(20_000, side, 1.0, torch.Generator().manual_seed(0)).double()
    top, bottom, left, right = boxes.unbind(1)
    height, width = bottom - top, right - left
    assert boxes.min() >= 0 and bottom.max() <= side and right.max() <= side
    area, shape = height * width / side**2, height / width
    assert 0.0195 < area.min() < 0.021 and 0.325 < area.max() < 0.331
    assert 0.29 < shape.min() < 0.31 and 3.2 < shape.max() < 3.4
    # Uniform, and uniform in the logarithm: quarters of them lie in quarters of the range.
    for value, low, high in ((area, 0.02, 0.33), (shape.log(), np.log(0.3), np.log(3.3))):
        counts = torch.histc(value, 4, low, high) / len(value)
        torch.testing.assert_close(
            counts, torch.full((4,), 0.25, dtype=counts.dtype), atol=0.02, rtol=0
        )
    free = top / (side - height).clamp(min=1)
    assert abs(free.mean() - 0.5) < 0.02 and free.max() <= 1


def test_a_share_of_the_images_is_erased():
    boxes = erasing_boxes(4000, SIDE, 0.25, torch.Generator().manual_seed(0))
    erased = (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
    assert 0.22 < erased.float().mean() < 0.28
    assert not (boxes[~erased, 1] - boxes[~erased, 0]).any()
    assert not torch.equal(boxes[0], boxes[1])


def test_erasing_fills_the_box_of_each_image_with_its_colour(noise):
    images = noise.images[:3] / 255
    boxes = torch.tensor([[2, 5, 0, 16], [0, 0, 0, 0], [10, 16, 3, 4]])
    colours = torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    expected = images.clone()
    for image, (top, bottom, left, right), colour in zip(expected, boxes.tolist(), colours):
        image[:, top:bottom, left:right] = colour[:, None, None]
    assert torch.equal(erase(images, boxes, colours), expected)
