"""CIFAR-10 and CIFAR-100 in torchvision's layout."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from classification.data.image_set import Source
from pcka.engine.config import ConfigError

DATASETS = {"cifar10": CIFAR10, "cifar100": CIFAR100}
SIDE = 32


def cifar_source(name: str, root: str, split: str, image_size: int, download: bool) -> Source:
    """Return the ``train`` or ``test`` part of CIFAR-10 or CIFAR-100.

    Args:
        name: "cifar10" or "cifar100".
        root: folder that holds (or, with ``download``, receives) the data.
        split: "train" or "test".
        image_size: must be 32.
        download: fetch missing data.

    Raises:
        ConfigError: another image size, or missing or damaged data.
    """
    if image_size != SIDE:
        raise ConfigError(f"DATA.IMAGE_SIZE: {name} has images of {SIDE} pixels, got {image_size}")
    dataset = DATASETS[name]
    try:
        data = dataset(root, train=split == "train", download=download)
    except RuntimeError as error:
        raise ConfigError(
            f"DATA.ROOT: no complete {name} in {root!r} (expected the folder "
            f"{dataset.base_folder!r} of the archive {dataset.filename!r} there); unpack the "
            "archive there, or set DATA.DOWNLOAD True to fetch it"
        ) from error
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    labels = np.asarray(data.targets, dtype=np.int64)
    return Source(labels, tuple(data.classes), lambda chosen: pixels[chosen].contiguous())
