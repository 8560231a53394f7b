"""RandAugment by batches beside torchvision's, which takes an image at a time."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

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
    values = space[name][0](31, SIDE, SIDE)
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
    changed = apply_each(images, chosen, chosen.argsort(stable=True), choice)
    for image, number, result in zip(images, chosen.tolist(), changed):
        torch.testing.assert_close(result, choice[number](image[None])[0])
