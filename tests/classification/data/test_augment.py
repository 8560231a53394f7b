from __future__ import annotations

import pytest
import torch

from classification.data import crop_and_flip


def one_by_one(images, offsets, flipped, padding):
    """What the batched version must give, an image at a time and by slices."""
    side = images.shape[-1]
    results = []
    for image, (row, column), mirror in zip(images, offsets.tolist(), flipped.tolist()):
        canvas = image.new_zeros(image.shape[0], side + 2 * padding, side + 2 * padding)
        canvas[:, padding : padding + side, padding : padding + side] = image
        window = canvas[:, row : row + side, column : column + side]
        results.append(window.flip(-1) if mirror else window)
    return torch.stack(results)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_and_flip_is_that_of_single_images(padding):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 3, 9, 9), generator=generator, dtype=torch.uint8)
    offsets = torch.randint(2 * padding + 1, (60, 2), generator=generator)
    flipped = torch.rand(60, generator=generator) < 0.5
    expected = one_by_one(images, offsets, flipped, padding)
    assert torch.equal(crop_and_flip(images, offsets, flipped, padding), expected)


def test_the_middle_window_is_the_image_itself():
    images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    middle = torch.full((2, 2), 3)
    assert torch.equal(crop_and_flip(images, middle, torch.zeros(2, dtype=torch.bool), 3), images)
