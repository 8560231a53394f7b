"""MobileNetV2 at half width for CIFAR, and MobileNetV1 for ImageNet.

Names as in RepDistiller and mdistiller, whose checkpoints load as they are.
"""

from __future__ import annotations

from torch import Tensor, nn

from classification.models.layers import (
    conv_bn,
    global_pool,
    initialize_classifier,
    initialize_convolutions,
)
from classification.models.registry import register

EXPANSION = 6
LAST_WIDTH = 1280
# For each row of blocks: expansion, channels (before halving), blocks, stride of the first.
ROWS_V2 = (
    (1, 16, 1, 1),
    (EXPANSION, 24, 2, 1),
    (EXPANSION, 32, 3, 2),
    (EXPANSION, 64, 4, 2),
    (EXPANSION, 96, 3, 1),
    (EXPANSION, 160, 3, 2),
    (EXPANSION, 320, 1, 1),
)
# Channels and stride of each depthwise separable convolution.
ROWS_V1 = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, linear projection (Sandler et al. 2018, figure 3)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.adds_input = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *conv_bn(in_channels, width, 1),
            nn.ReLU(),
            *conv_bn(width, width, 3, stride, groups=width),
            nn.ReLU(),
            *conv_bn(width, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` -> `(B, out_channels, H / stride, W / stride)`."""
        return x + self.conv(x) if self.adds_input else self.conv(x)


class MobileNetV2(nn.Module):
    """Sandler et al. (CVPR 2018) at half width, with strides for images of 32 pixels.

    Attributes:
        stage_names: the stem and the last row of each resolution; rows end without an activation.
        preactivation_names: the stem before its activation, and the same rows.
        preactivation_norms: for the rows, the norms that end the last block, as in mdistiller.
    """

    stage_names = ("conv1", "blocks.1", "blocks.2", "blocks.4", "blocks.6")
    preactivation_names = ("conv1.2:input", *stage_names[1:])
    preactivation_norms = (
        "conv1.1", "blocks.1.1.conv.7", "blocks.2.2.conv.7", "blocks.4.2.conv.7",
        "blocks.6.0.conv.7",
    )  # fmt: skip
    pooled_name = "avgpool"
    classifier_name = "classifier.0"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = 16
        self.conv1 = nn.Sequential(*conv_bn(3, channels, 3, 2), nn.ReLU())
        rows = []
        for expansion, width, depth, stride in ROWS_V2:
            width //= 2
            first = InvertedResidual(channels, width, stride, expansion)
            rest = (InvertedResidual(width, width, 1, expansion) for _ in range(depth - 1))
            rows.append(nn.Sequential(first, *rest))
            channels = width
        self.blocks = nn.Sequential(*rows)
        self.conv2 = nn.Sequential(*conv_bn(channels, LAST_WIDTH, 1), nn.ReLU())
        self.avgpool = global_pool()
        linear = nn.Linear(LAST_WIDTH, num_classes)
        self.classifier = nn.Sequential(linear)
        initialize_convolutions(self)
        initialize_classifier(linear)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` -> logits `(B, num_classes)`."""
        return self.classifier(self.avgpool(self.conv2(self.blocks(self.conv1(images)))))


class MobileNetV1(nn.Module):
    """Depthwise separable convolutions (Howard et al. 2017), for images of 224 pixels.

    Attributes:
        stage_names: the stem and the last convolution of each resolution, after its activation.
        preactivation_names: the norms before these activations.
    """

    stage_names = ("model.0", "model.3", "model.5", "model.11", "model.13")
    preactivation_names = ("model.0.1", "model.3.4", "model.5.4", "model.11.4", "model.13.4")
    preactivation_norms = preactivation_names
    pooled_name = "avgpool"
    classifier_name = "fc"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = 32
        rows = [nn.Sequential(*conv_bn(3, channels, 3, 2), nn.ReLU())]
        for width, stride in ROWS_V1:
            depthwise = [*conv_bn(channels, channels, 3, stride, groups=channels), nn.ReLU()]
            rows.append(nn.Sequential(*depthwise, *conv_bn(channels, width, 1), nn.ReLU()))
            channels = width
        self.model = nn.Sequential(*rows)
        self.avgpool = global_pool()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` -> logits `(B, num_classes)`."""
        return self.fc(self.avgpool(self.model(images)))


register("MobileNetV2")(MobileNetV2)
register("MobileNetV1")(MobileNetV1)
