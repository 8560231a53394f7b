"""Building blocks shared by several model families, and their initialisation."""

from __future__ import annotations

from torch import nn


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> list[nn.Module]:
    """Return a convolution that preserves the size (except for its stride), and a batch norm."""
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


def initialize_convolutions(model: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / fan_out) and zero its bias.

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
