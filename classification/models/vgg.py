"""VGG with batch normalisation for small images (Simonyan and Zisserman, ICLR 2015).

Names as in RepDistiller and mdistiller, whose checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from classification.models.layers import (
    conv_bn,
    global_pool,
    initialize_classifier,
    initialize_convolutions,
)
from classification.models.registry import register

WIDTHS = (64, 128, 256, 512, 512)
SMALL_MAP = 4  # side of a 32-pixel image after three poolings; it is not pooled again


class PoolLargeMaps(nn.MaxPool2d):
    """Max pooling, except for the small maps of CIFAR images after three poolings."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, C, H / 2, W / 2)`, or `x` itself."""
        return x if x.shape[2] <= SMALL_MAP else super().forward(x)


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions with pooling between them, and a linear classifier.

    Before the mean, images of 32 pixels are pooled three times, those of 40 or more four times.

    Args:
        num_classes: number of logits.
        depths: convolutions per block.

    Attributes:
        stage_names: the activations at the ends of the blocks.
        preactivation_names: the blocks, which end with their `preactivation_norms`.
    """

    stage_names = ("relu0", "relu1", "relu2", "relu3", "relu4")
    preactivation_names = ("block0", "block1", "block2", "block3", "block4")
    pooled_name = "avgpool"
    classifier_name = "classifier"
    relu4: nn.Module
    block4: nn.Module

    def __init__(self, num_classes: int, *, depths: Sequence[int]) -> None:
        super().__init__()
        self.preactivation_norms: tuple[str, ...] = ()
        channels = 3
        for index, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [*conv_bn(channels, width, 3, bias=True), nn.ReLU()]
                channels = width
            # The block's last activation is a separate module, so that it can be tapped.
            self.add_module(f"block{index}", nn.Sequential(*layers[:-1]))
            self.add_module(f"relu{index}", nn.ReLU())
            self.preactivation_norms += (f"block{index}.{len(layers) - 2}",)
        self.pool = nn.MaxPool2d(2)
        self.last_pool = PoolLargeMaps(2)
        self.avgpool = global_pool()
        self.classifier = nn.Linear(channels, num_classes)
        initialize_convolutions(self)
        initialize_classifier(self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` -> logits `(B, num_classes)`."""
        x = images
        for index, pool in enumerate((self.pool, self.pool, self.pool, self.last_pool)):
            x = pool(getattr(self, f"relu{index}")(getattr(self, f"block{index}")(x)))
        x = self.relu4(self.block4(x))
        return self.classifier(self.avgpool(x))


for _name, _depths in {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}.items():
    register(_name)(partial(VGG, depths=_depths))
