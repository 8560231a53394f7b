"""Residual networks for 32x32 images (He et al., CVPR 2016, section 4.2 and table 1).

The checkpoints in circulation were trained with three public implementations. They share the
arithmetic and differ in the shortcut and in two module names; a `Layout` describes the differences,
so that each one's `state_dict` loads unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from classification.models.layers import conv_bn, global_pool, initialize_convolutions
from classification.models.registry import register


class ProjectionShortcut(nn.Sequential):
    """Option B of He et al.: a strided 1x1 convolution and a batch norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(*conv_bn(in_channels, out_channels, 1, stride))


class PaddingShortcut(nn.Module):
    """Option A of He et al.: strided subsampling, zero channels on both sides, no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.channel_padding = (before, out_channels - in_channels - before)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` -> `(B, out_channels, ceil(H / stride), ceil(W / stride))`."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.channel_padding))


@dataclass(frozen=True)
class Layout:
    """The differences between the `state_dict`s of the public implementations."""

    shortcut: Callable[[int, int, int], nn.Module]
    shortcut_name: str
    classifier_name: str


REPDISTILLER = Layout(ProjectionShortcut, "downsample", "fc")
PYTORCH_CIFAR = Layout(ProjectionShortcut, "shortcut", "linear")
OPTION_A = Layout(PaddingShortcut, "shortcut", "linear")


class ResidualBlock(nn.Module):
    """`relu(branch(x) + shortcut(x))`: what the basic block and the bottleneck share.

    ReLUs are not in place, so that a tensor seen by a forward hook keeps its values.
    """

    expansion: int
    """Ratio of output channels to `width`."""
    last_norm: str
    """Name of the batch norm that ends the branch."""

    def __init__(self, in_channels: int, width: int, stride: int, layout: Layout) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self._add_branch(in_channels, width, stride)
        changes_shape = stride != 1 or in_channels != out_channels
        shortcut = (
            layout.shortcut(in_channels, out_channels, stride) if changes_shape else nn.Identity()
        )
        self.shortcut_name = layout.shortcut_name
        self.add_module(self.shortcut_name, shortcut)
        self.relu = nn.ReLU()

    def _add_branch(self, in_channels: int, width: int, stride: int) -> None:
        raise NotImplementedError

    def _branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` -> `(B, width * expansion, H / stride, W / stride)`."""
        return self.relu(self._branch(x) + getattr(self, self.shortcut_name)(x))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions."""

    expansion = 1
    last_norm = "bn2"

    def _add_branch(self, in_channels: int, width: int, stride: int) -> None:
        self.conv1, self.bn1 = conv_bn(in_channels, width, 3, stride)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = conv_bn(width, width, 3)

    def _branch(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(ResidualBlock):
    """A 1x1, a (strided) 3x3 and a widening 1x1 convolution."""

    expansion = 4
    last_norm = "bn3"

    def _add_branch(self, in_channels: int, width: int, stride: int) -> None:
        self.conv1, self.bn1 = conv_bn(in_channels, width, 1)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = conv_bn(width, width, 3, stride)
        self.relu2 = nn.ReLU()
        self.conv3, self.bn3 = conv_bn(width, width * self.expansion, 1)

    def _branch(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class CifarResNet(nn.Module):
    """A 3x3 stem, stages of residual blocks (all but the first halve the map), a classifier.

    Args:
        num_classes: number of logits.
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks per stage.
        widths: width of each stage's blocks, before the block's expansion.
        stem_width: channels of the stem.
        layout: shortcut and module names.

    Attributes:
        stage_names: paths of the modules whose outputs are the stage outputs, stem first.
        preactivation_names: the inputs of the stages' last activations, the sums of branch and
            shortcut.
        preactivation_norms: the norms that end the branches of these sums.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        block: type[ResidualBlock],
        depths: Sequence[int],
        widths: Sequence[int],
        stem_width: int,
        layout: Layout,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, stem_width, 3)
        self.relu = nn.ReLU()
        self.stage_names: tuple[str, ...] = ("relu",)
        self.preactivation_names: tuple[str, ...] = ("relu:input",)
        self.preactivation_norms: tuple[str, ...] = ("bn1",)
        channels = stem_width
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            out_channels = width * block.expansion
            first = block(channels, width, 1 if index == 1 else 2, layout)
            rest = (block(out_channels, width, 1, layout) for _ in range(depth - 1))
            self.add_module(f"layer{index}", nn.Sequential(first, *rest))
            last = f"layer{index}.{depth - 1}"
            self.stage_names += (f"layer{index}",)
            self.preactivation_names += (f"{last}.relu:input",)
            self.preactivation_norms += (f"{last}.{block.last_norm}",)
            channels = out_channels
        self.avgpool = global_pool()
        self.pooled_name = "avgpool"
        self.classifier_name = layout.classifier_name
        self.add_module(self.classifier_name, nn.Linear(channels, num_classes))
        initialize_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` -> logits `(B, num_classes)`."""
        x = self.relu(self.bn1(self.conv1(images)))
        for name in self.stage_names[1:]:
            x = getattr(self, name)(x)
        return getattr(self, self.classifier_name)(self.avgpool(x))


def _register_thin(
    name: str, depth: int, layout: Layout = REPDISTILLER, stem: int = 16, widen: int = 1
) -> None:
    """Register a network of three stages, 16, 32, 64 (times `widen`) channels, `depth` = 6n + 2."""
    make = partial(
        CifarResNet,
        block=BasicBlock,
        depths=[(depth - 2) // 6] * 3,
        widths=[16 * widen, 32 * widen, 64 * widen],
        stem_width=stem,
        layout=layout,
    )
    register(name)(make)


def _register_wide(name: str, block: type[ResidualBlock], depths: Sequence[int]) -> None:
    """Register a network with ImageNet's four stages after a CIFAR stem."""
    make = partial(
        CifarResNet,
        block=block,
        depths=depths,
        widths=[64, 128, 256, 512],
        stem_width=64,
        layout=PYTORCH_CIFAR,
    )
    register(name)(make)


for _depth in (8, 14, 20, 32, 44, 56, 110):
    _register_thin(f"resnet{_depth}", _depth)
for _depth in (8, 32):
    _register_thin(f"resnet{_depth}x4", _depth, stem=32, widen=4)
for _depth in (20, 56):
    _register_thin(f"resnet{_depth}_option_a", _depth, layout=OPTION_A)
_register_wide("ResNet18", BasicBlock, [2, 2, 2, 2])
_register_wide("ResNet50", Bottleneck, [3, 4, 6, 3])
