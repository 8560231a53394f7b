"""The handwritten digits that ship with scikit-learn; nothing is downloaded."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from fvcore.common.config import CfgNode
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from classification.data.image_set import balanced_order
from classification.data.source import Source, register

TEST_IMAGES = 897  # of 1,797
SPLIT_SEED = 0  # the test images are always the same, whatever the configuration
HIGHEST_VALUE = 16  # pixel values in the package are 0..16


@register("digits")
def digits_source(data: CfgNode, split: str) -> Source:
    """Return the ``train`` (900 images) or ``test`` (897) part of the digits.

    Args:
        data: IMAGE_SIZE, to which the 8x8 originals are resized bilinearly.
        split: "train" or "test".
    """
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    order = balanced_order(labels, SPLIT_SEED)
    chosen = np.sort(order[:TEST_IMAGES] if split == "test" else order[TEST_IMAGES:])
    read = partial(_read, digits.images[chosen], data.IMAGE_SIZE)
    return Source(labels[chosen], tuple(str(name) for name in digits.target_names), read)


def _read(originals: np.ndarray, image_size: int, indices: np.ndarray) -> Tensor:
    grey = torch.from_numpy(originals[indices]).float()[:, None] * (255 / HIGHEST_VALUE)
    size = (image_size, image_size)
    grey = F.interpolate(grey, size, mode="bilinear", align_corners=False)
    return grey.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
