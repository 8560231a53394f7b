"""ShuffleNets for images of 32 pixels: V1 with three groups, V2 at width 1x.

Names as in RepDistiller and mdistiller, whose checkpoints load as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from classification.models.layers import conv_bn, global_pool
from classification.models.registry import register

STEM_WIDTH = 24
DEPTHS = (4, 8, 4)
GROUPS_V1 = 3
WIDTHS_V1 = (240, 480, 960)
WIDTHS_V2 = (116, 232, 464)
LAST_WIDTH_V2 = 1024


class UnitV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1 (Zhang et al., CVPR 2018, figure 2).

    With stride 2 the pooled input is concatenated to the branch, otherwise the input is added.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        branch = out_channels - in_channels if stride == 2 else out_channels
        width = branch // 4
        # The stem's few channels are not divided into groups.
        groups = 1 if in_channels == STEM_WIDTH else GROUPS_V1
        self.conv1, self.bn1 = conv_bn(in_channels, width, 1, groups=groups)
        self.relu1 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(groups)
        self.conv2, self.bn2 = conv_bn(width, width, 3, stride, groups=width)
        self.relu2 = nn.ReLU()
        self.conv3, self.bn3 = conv_bn(width, branch, 1, groups=GROUPS_V1)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` -> `(B, out_channels, H / stride, W / stride)`."""
        branch = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        branch = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(branch)))))
        if self.pool is None:
            return self.relu(branch + x)
        return self.relu(torch.cat([branch, self.pool(x)], dim=1))


class BasicUnitV2(nn.Module):
    """Half of the channels pass through, half are convolved; then both are shuffled.

    Source: Ma et al., ECCV 2018, figure 3 (c).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // 2
        self.conv1, self.bn1 = conv_bn(width, width, 1)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = conv_bn(width, width, 3, groups=width)
        self.conv3, self.bn3 = conv_bn(width, width, 1)
        self.relu = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, C, H, W)`."""
        passed, branch = x.chunk(2, dim=1)
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(branch)))))
        branch = self.bn3(self.conv3(branch))
        # The half that passes through comes from a ReLU, so another one does not change it.
        return self.relu(self.shuffle(torch.cat([passed, branch], dim=1)))


class DownUnitV2(nn.Module):
    """Two strided branches, concatenated and shuffled (Ma et al., ECCV 2018, figure 3 (d))."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        width = out_channels // 2
        self.conv1, self.bn1 = conv_bn(in_channels, in_channels, 3, 2, groups=in_channels)
        self.conv2, self.bn2 = conv_bn(in_channels, width, 1)
        self.relu2 = nn.ReLU()
        self.conv3, self.bn3 = conv_bn(in_channels, width, 1)
        self.relu3 = nn.ReLU()
        self.conv4, self.bn4 = conv_bn(width, width, 3, 2, groups=width)
        self.conv5, self.bn5 = conv_bn(width, width, 1)
        self.relu = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` -> `(B, out_channels, H / 2, W / 2)`."""
        left = self.relu2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(self.relu3(self.bn3(self.conv3(x)))))
        right = self.relu(self.bn5(self.conv5(right)))
        return self.shuffle(torch.cat([left, right], dim=1))


class ShuffleNet(nn.Module):
    """A 1x1 stem, three stages that begin with a strided unit, and a widening convolution in V2.

    Attributes:
        stage_names: stem and stages, after their activations.
        preactivation_names: the inputs of the last units' activations; half of V2's are outputs of
            earlier activations (mdistiller has the same channels, unshuffled).
        preactivation_norms: in V1, as in a residual network; no norm produces all channels of a
            stage of V2.
    """

    stage_names = ("relu", "layer1", "layer2", "layer3")
    preactivation_names = (
        "relu:input", "layer1.3.relu:input", "layer2.7.relu:input", "layer3.3.relu:input"
    )  # fmt: skip
    preactivation_norms: tuple[str, ...]
    pooled_name = "avgpool"
    classifier_name = "linear"
    widths: tuple[int, ...]
    last_width: int | None = None
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, STEM_WIDTH, 1)
        self.relu = nn.ReLU()
        channels = STEM_WIDTH
        for index, (width, depth) in enumerate(zip(self.widths, DEPTHS, strict=True), start=1):
            self.add_module(f"layer{index}", nn.Sequential(*self._units(channels, width, depth)))
            channels = width
        if self.last_width is not None:
            self.conv2, self.bn2 = conv_bn(channels, self.last_width, 1)
            self.relu2 = nn.ReLU()
            channels = self.last_width
        self.avgpool = global_pool()
        self.linear = nn.Linear(channels, num_classes)

    def _units(self, in_channels: int, out_channels: int, depth: int) -> list[nn.Module]:
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` -> logits `(B, num_classes)`."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.last_width is not None:
            x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(self.avgpool(x))


class ShuffleNetV1(ShuffleNet):
    """Zhang et al., CVPR 2018."""

    preactivation_norms = ("bn1", "layer1.3.bn3", "layer2.7.bn3", "layer3.3.bn3")
    widths = WIDTHS_V1

    def _units(self, in_channels: int, out_channels: int, depth: int) -> list[nn.Module]:
        rest = (UnitV1(out_channels, out_channels, 1) for _ in range(depth - 1))
        return [UnitV1(in_channels, out_channels, 2), *rest]


class ShuffleNetV2(ShuffleNet):
    """Ma et al., ECCV 2018."""

    preactivation_norms = ("bn1", "", "", "")
    widths = WIDTHS_V2
    last_width = LAST_WIDTH_V2

    def _units(self, in_channels: int, out_channels: int, depth: int) -> list[nn.Module]:
        rest = (BasicUnitV2(out_channels) for _ in range(depth - 1))
        return [DownUnitV2(in_channels, out_channels), *rest]


register("ShuffleV1")(ShuffleNetV1)
register("ShuffleV2")(ShuffleNetV2)
