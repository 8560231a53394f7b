"""CIFAR-10 and CIFAR-100 in torchvision's layout."""

from __future__ import annotations

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torchvision.datasets import CIFAR10, CIFAR100

from classification.data.source import Source, register
from pcka.engine.config import ConfigError

DATASETS = {"cifar10": CIFAR10, "cifar100": CIFAR100}
SIDE = 32


@register("cifar10")
@register("cifar100")
def cifar_source(data: CfgNode, split: str) -> Source:
    """Return the ``train`` or ``test`` part of CIFAR-10 or CIFAR-100.

    Args:
        data: NAME; ROOT, the folder that holds (or, with DOWNLOAD, receives) the data; IMAGE_SIZE,
            which must be 32.
        split: "train" or "test".

    Raises:
        ConfigError: another image size, or missing or damaged data.
    """
    if data.IMAGE_SIZE != SIDE:
        raise ConfigError(
            f"DATA.IMAGE_SIZE: {data.NAME} has images of {SIDE} pixels, got {data.IMAGE_SIZE}"
        )
    dataset = DATASETS[data.NAME]
    try:
        images = dataset(data.ROOT, train=split == "train", download=data.DOWNLOAD)
    except RuntimeError as error:
        raise ConfigError(
            f"DATA.ROOT: no complete {data.NAME} in {data.ROOT!r} (no {dataset.base_folder!r}); "
            f"unpack {dataset.filename!r} there, or set DATA.DOWNLOAD True to fetch it"
        ) from error
    pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2)
    labels = np.asarray(images.targets, dtype=np.int64)
    return Source(labels, tuple(images.classes), lambda chosen: pixels[chosen].contiguous())
