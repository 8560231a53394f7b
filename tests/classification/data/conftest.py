"""Image files so few and small that a test may stream them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from classification.config import load_config

CLASSES = ("amber", "blue", "red")
TRAINING_IMAGES, TEST_IMAGES = 12, 3  # of each class


@pytest.fixture
def noisy_root(tmp_path):
    """A class-per-folder set of noise, 40 x 30 pixels; no two images are alike."""
    generator = np.random.RandomState(0)
    for split, images in (("train", TRAINING_IMAGES), ("val", TEST_IMAGES)):
        for name in CLASSES:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = generator.randint(256, size=(30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return tmp_path


@pytest.fixture
def streaming_config(noisy_root):
    """The configuration of a streaming run on these; further keys by their dotted names."""

    def config(**keys: object):
        values = {
            "STUDENT.NAME": "resnet8",
            "DATA.NAME": "folder",
            "DATA.ROOT": noisy_root,
            "DATA.IMAGE_SIZE": 16,
            "DATA.STREAM": True,
            "DATA.WORKERS": 0,
            "SOLVER.BATCH_SIZE": 8,
            **keys,
        }
        return load_config(None, [str(word) for pair in values.items() for word in pair])

    return config
