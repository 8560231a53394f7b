"""RandAugment by batches beside torchvision's, which takes an image at a time."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from classification.data import rand_augment
from classification.data.rand_augment import apply_each, operations

SIDE = 16
SIGNED = [
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness",
]  # fmt: skip
UNSIGNED = ["Identity", "Posterize", "Solarize", "AutoContrast", "Equalize"]


@pytest.fixture
def images():
    """Distinct, with no flat channels."""
    return torch.rand(28, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def torchvisions(images, name, magnitude, sign):
    reference = v2.RandAugment(magnitude=magnitude)
    space = reference._AUGMENTATION_SPACE
    assert set(space) == {*SIGNED, *UNSIGNED}
    values = space[name][0](31, *images.shape[-2:])
    value = 0.0 if values is None else sign * float(values[magnitude])
    return reference._apply_image_or_video_transform(
        images, name, value, interpolation=reference.interpolation, fill=reference._fill
    )


@pytest.mark.parametrize("magnitude", [0, 1, 9, 15, 30])
def test_the_operations_are_torchvisions(images, magnitude):
    given = operations(magnitude, SIDE)
    names = [(n, 1) for n in SIGNED] + [(n, -1) for n in SIGNED] + 2 * [(n, 1) for n in UNSIGNED]
    assert len(given) == len(names) == 28
    for operation, (name, sign) in zip(given, names):
        torch.testing.assert_close(operation(images), torchvisions(images, name, magnitude, sign))


def test_every_image_gets_its_own_operation(images):
    choice = operations(9, SIDE)
    chosen = torch.randint(28, (28,), generator=torch.Generator().manual_seed(1))
    changed = apply_each(images.clone(), chosen, chosen.argsort(stable=True), choice)
    for image, number, result in zip(images, chosen.tolist(), changed):
        torch.testing.assert_close(result, choice[number](image[None])[0])


@pytest.mark.parametrize("at_once", [1, 3 * SIDE**2 * 4 * 2, 2**20])
def test_images_that_are_transformed_few_at_once_come_to_the_same(images, monkeypatch, at_once):
    choice, chosen = operations(9, SIDE), torch.arange(28).repeat_interleave(2)[:28] % 5
    expected = torch.cat([choice[number](image[None]) for image, number in zip(images, chosen)])
    monkeypatch.setattr(rand_augment, "AT_ONCE", at_once)
    changed = apply_each(images.clone(), chosen, chosen.argsort(stable=True), choice)
    torch.testing.assert_close(changed, expected)


@pytest.mark.parametrize("side", [2, 33])
def test_pixels_are_moved_bit_for_bit_as_torchvision_moves_them(side):
    """Nearest pixels: an operation that picks a neighbour instead is wrong by much."""
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(2))
    for magnitude in (0, 9, 30):
        given = operations(magnitude, side)
        for sign, first in ((1, 0), (-1, len(SIGNED))):
            for number, name in enumerate(SIGNED[:5]):
                theirs = torchvisions(images, name, magnitude, sign)
                assert torch.equal(given[first + number](images), theirs), (name, magnitude, sign)
