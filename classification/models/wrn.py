"""Wide residual networks with pre-activation blocks (Zagoruyko and Komodakis 2016).

Names as in RepDistiller and mdistiller, whose checkpoints load as they are.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from classification.models.layers import global_pool, initialize_convolutions
from classification.models.registry import register

STEM_WIDTH = 16


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Conv2d:
    padding = kernel // 2
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)


class PreactivationBlock(nn.Module):
    """`shortcut + conv2(relu(bn2(conv1(relu(bn1(x))))))`.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input; otherwise
    it is the input itself.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv(out_channels, out_channels, 3, 1)
        changes = in_channels != out_channels
        self.convShortcut = _conv(in_channels, out_channels, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` -> `(B, out_channels, H / stride, W / stride)`."""
        activated = self.relu1(self.bn1(x))
        branch = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return branch + (x if self.convShortcut is None else self.convShortcut(activated))


class Stage(nn.Module):
    """Blocks of one width; the first one has the stride."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, stride: int) -> None:
        super().__init__()
        first = PreactivationBlock(in_channels, out_channels, stride)
        rest = (PreactivationBlock(out_channels, out_channels, 1) for _ in range(depth - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` -> `(B, out_channels, H / stride, W / stride)`."""
        return self.layer(x)


class WideResNet(nn.Module):
    """Three stages of `(depth - 4) / 6` blocks, 16, 32 and 64 channels times `widen`.

    Args:
        num_classes: number of logits.
        depth: 6 n + 4.
        widen: width factor.

    Attributes:
        stage_names: stem and stages; the blocks end without an activation.
        preactivation_names: the norm after each, as in mdistiller: the next block's first one, or
            the network's last.
    """

    stage_names = ("conv1", "block1", "block2", "block3")
    preactivation_names = ("block1.layer.0.bn1", "block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
    preactivation_norms = preactivation_names
    pooled_name = "avgpool"
    classifier_name = "fc"

    def __init__(self, num_classes: int, *, depth: int, widen: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16 * widen, 32 * widen, 64 * widen]
        self.conv1 = _conv(3, STEM_WIDTH, 3, 1)
        self.block1 = Stage(STEM_WIDTH, widths[0], blocks, 1)
        self.block2 = Stage(widths[0], widths[1], blocks, 2)
        self.block3 = Stage(widths[1], widths[2], blocks, 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU()
        self.avgpool = global_pool()
        self.fc = nn.Linear(widths[2], num_classes)
        initialize_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` -> logits `(B, num_classes)`."""
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.avgpool(self.relu(self.bn1(x))))


for _depth in (16, 40):
    for _widen in (1, 2):
        register(f"wrn_{_depth}_{_widen}")(partial(WideResNet, depth=_depth, widen=_widen))
