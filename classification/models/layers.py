"""Parts that several model families are made of, and how they start."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> list[nn.Module]:
    """A convolution that keeps the size (but for its stride), and a batch norm."""
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=kernel // 2,
        groups=groups,
        bias=bias,
    )
    return [conv, nn.BatchNorm2d(out_channels)]


def global_pool() -> nn.Sequential:
    """`(B, C, H, W)` -> `(B, C)`, the mean over positions."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ChannelShuffle(nn.Module):
    """Interleave the channels of `groups` groups (Zhang et al., CVPR 2018, figure 1)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, C, H, W)`, channel `g * C / groups + c` to `c * groups + g`."""
        batch, channels, height, width = x.shape
        grouped = x.view(batch, self.groups, channels // self.groups, height, width)
        return torch.transpose(grouped, 1, 2).reshape(batch, channels, height, width)


def initialize_convolutions(model: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / fan_out) and zero its bias.

    Normalisation and linear layers keep torch's defaults.

    Source: He et al., Delving Deep into Rectifiers, ICCV 2015, section 2.2 (backward case).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialize_classifier(linear: nn.Linear) -> None:
    """Draw the weights from N(0, 0.01^2) and zero the bias, as the VGGs and MobileNetV2 do."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
