"""The teacher of a detector: its backbone and neck, and its head if a loss reads that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import detection.backbones  # noqa: F401  (registers itself)
from detection.checkpoint import load_weights
from detection.config import build, build_student, registered, teacher_config
from detection.pixels import LEVEL, PixelParts
from detection.teacher_checks import check_statistics, check_trained
from pcka.engine.config import ConfigError
from pcka.losses.heads import Dense, DenseHead, Inner
from pcka.teacher import FrozenTeacher

if TYPE_CHECKING:
    from detection.heads import Parts

HEAD = "head"  # key of the head's outputs, besides those of the levels
AUTOCAST = {"": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


class TeacherBackbone(nn.Module):
    """Images from the student's data loader -> the teacher's feature maps.

    The images are converted to the teacher's channel order, then normalised with the teacher's own
    pixel statistics, so that one decoded image serves both models.

    Args:
        backbone: detectron2 backbone; its batch norms are folded here.
        pixel_mean, pixel_std: the teacher's pixel statistics, in its channel order.
        swap_channels: the student's images are BGR and the teacher's RGB, or vice versa.
        autocast: dtype of the forward pass, or None for the student's.
        channels_last: keep weights and images in this memory format.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        *,
        swap_channels: bool = False,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = fold_batch_norms(backbone)
        self.size_divisibility = max(backbone.size_divisibility, 1)
        self.swap_channels = swap_channels
        self.autocast = autocast
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone.to(memory_format=self.memory_format)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1))

    def output_shape(self) -> Mapping[str, ShapeSpec]:
        """Channels and stride of each level."""
        return cast(Backbone, self.backbone).output_shape()

    def forward(self, images: Sequence[Tensor], canvas: tuple[int, int]) -> dict[str, Tensor]:
        """Level -> ``(B, C, H, W)``, cropped to the canvas.

        Args:
            images: ``(3, H_i, W_i)`` each, from 0 to 255, as the student's data loader returns
                them.
            canvas: height and width that the student padded the batch to. The teacher pads it
                further, on the right and bottom, to the next multiple of its own backbone's size
                divisibility, and crops its maps to the canvas.
        """
        return self.cut(self.run(images, canvas), canvas)

    def run(self, images: Sequence[Tensor], canvas: tuple[int, int]) -> dict[str, Tensor]:
        """Level -> ``(B, C, H, W)``, of the canvas as padded by the teacher."""
        device = self.pixel_mean.device
        step = self.size_divisibility
        height, width = (math.ceil(side / step) * step for side in canvas)
        batch = torch.zeros(len(images), 3, height, width, device=device)
        for slot, image in zip(batch, images):
            image = image.to(device).flip(0) if self.swap_channels else image.to(device)
            slot[:, : image.shape[1], : image.shape[2]] = (image - self.pixel_mean) / self.pixel_std
        with self._precision(device.type):
            return cast(
                "dict[str, Tensor]",
                self.backbone(batch.contiguous(memory_format=self.memory_format)),
            )

    def cut(self, maps: Mapping[str, Tensor], canvas: tuple[int, int]) -> dict[str, Tensor]:
        """Crop the maps to the canvas."""
        cut = {}
        for level, shape in self.output_shape().items():
            rows, columns = (math.ceil(side / (shape.stride or 1)) for side in canvas)
            cut[level] = maps[level][:, :, :rows, :columns]
        return cut

    def _precision(self, device: str) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device, self.autocast, enabled=self.autocast != torch.float32)


class TeacherDetector(TeacherBackbone):
    """A :class:`TeacherBackbone` with the whole detector, or segmenter.

    Its head runs only if ``parts`` is set, on the maps cropped to the canvas. A semantic
    segmentation head runs on whole maps, whose sizes match across levels; its outputs are cropped.

    Args:
        detector: detectron2 model with a ``backbone``.
        pixel_mean, pixel_std, keywords: passed to :class:`TeacherBackbone`.

    Attributes:
        parts: parts of the detector's head that the losses read; None if they read none.
    """

    def __init__(
        self,
        detector: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        **keywords: Any,
    ) -> None:
        super().__init__(cast(Backbone, detector.backbone), pixel_mean, pixel_std, **keywords)
        self.detector = detector
        self.parts: Parts | None = None

    def forward(self, images: Sequence[Tensor], canvas: tuple[int, int]) -> dict[str, Any]:
        """As :meth:`TeacherBackbone.forward`, with the head's outputs under ``"head"``.

        For a semantic segmentation head, ``"sem_seg"`` is the input map of its last layer.
        """
        whole = self.run(images, canvas)
        maps: dict[str, Any] = self.cut(whole, canvas)
        if self.parts is None:
            return maps
        with self._precision(self.pixel_mean.device.type):
            head: Any
            if isinstance(self.parts, PixelParts):
                head = self.parts.teach(whole, canvas)
                maps[LEVEL] = head.features
            else:
                sizes = [(image.shape[-2], image.shape[-1]) for image in images]
                head = self.parts.teach(maps, sizes)
        if isinstance(head, DenseHead) and head.rest is not None:
            head = replace(head, rest=partial(self._precisely, head.rest))
        maps[HEAD] = head
        return maps

    def detect(self, image: Tensor, height: int, width: int) -> Instances:
        """Return the teacher's own detections in one image.

        Args:
            image: ``(3, H, W)``, as the student's data loader returns it.
            height, width: size of the image that the boxes refer to.
        """
        return cast(Instances, self._infer(image, height, width)["instances"])

    def classify(self, image: Tensor, height: int, width: int) -> Tensor:
        """Return the teacher's class of each pixel, ``(height, width)``; see :meth:`detect`."""
        return cast(Tensor, self._infer(image, height, width)["sem_seg"]).argmax(0)

    def _infer(self, image: Tensor, height: int, width: int) -> dict[str, Any]:
        own = image.flip(0) if self.swap_channels else image
        (found,) = self.detector([{"image": own, "height": height, "width": width}])
        return cast("dict[str, Any]", found)

    def _precisely(self, rest: Callable[[Inner], Dense], inner: Inner) -> Dense:
        with self._precision(self.pixel_mean.device.type):
            return rest(inner)


def build_teacher(cfg: CfgNode, *, with_head: bool = False) -> FrozenTeacher:
    """Return the teacher of ``DISTILL.TEACHER`` with its weights, frozen.

    It wraps a :class:`TeacherBackbone`, or with ``with_head`` a :class:`TeacherDetector`.

    Raises:
        ValueError: the configuration cannot be read, or the weights do not fit it.
    """
    own, wanted = teacher_config(cfg), cfg.DISTILL.TEACHER
    check_statistics(own.MODEL.PIXEL_MEAN, own.MODEL.PIXEL_STD)
    registered(BACKBONE_REGISTRY, own.MODEL.BACKBONE.NAME, "the teacher's MODEL.BACKBONE.NAME")
    if with_head:
        holder = build_student(own, "the teacher's MODEL")
    else:
        holder = nn.Module()  # gives the backbone's weights the names of a detector's file
        holder.backbone = build(build_backbone, own, "the teacher's MODEL")
    backbone = cast(Backbone, holder.backbone)
    if own.MODEL.WEIGHTS:
        try:
            load_weights(holder, own.MODEL.WEIGHTS)
            if not wanted.RANDOM_WEIGHTS:
                check_trained(backbone, own.MODEL.WEIGHTS)
        except ValueError as error:
            raise ConfigError(f"DISTILL.TEACHER.WEIGHTS: {error}") from error
    kind: Any = TeacherDetector if with_head else TeacherBackbone
    return FrozenTeacher(
        kind(
            holder if with_head else backbone,
            own.MODEL.PIXEL_MEAN,
            own.MODEL.PIXEL_STD,
            swap_channels=_unlike_channels(cfg.INPUT.FORMAT, own.INPUT.FORMAT),
            autocast=_autocast_dtype(wanted.AUTOCAST),
            channels_last=wanted.CHANNELS_LAST,
        )
    )


def take_channels(detector: nn.Module, own: str, given: str) -> nn.Module:
    """Let a detector take images in another channel order than its own; return the detector.

    Args:
        detector: detectron2 detector or segmenter; if the orders differ, it gets a forward hook
            that converts its images.
        own: ``INPUT.FORMAT`` of the detector.
        given: ``INPUT.FORMAT`` of the images that it will be given.

    Raises:
        ConfigError: neither is the other in reverse.
    """
    if _unlike_channels(given, own):
        detector.register_forward_pre_hook(_swap_channels)
    return detector


def _swap_channels(_: nn.Module, inputs: tuple[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    (batch,) = inputs
    return [{**entry, "image": entry["image"].flip(0)} for entry in batch]


@torch.no_grad()
def fold_batch_norms(backbone: nn.Module) -> nn.Module:
    """Fold the batch norms of detectron2's convolutions into their weights; return the backbone.

    ``BN(Wx + b) = (s W) x + (b - mean) s + beta`` with ``s = gamma / sqrt(var + eps)``: the same
    maps up to rounding, in one pass over each instead of two. Only detectron2 convolutions followed
    by a batch norm with running statistics are changed.

    Args:
        backbone: modified in place; from then on for inference only.
    """
    # A subclass may use its weight differently.
    convs: list[Conv2d] = [module for module in backbone.modules() if type(module) is Conv2d]
    for conv in convs:
        norm = conv.norm
        if _has_statistics(norm):
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias,
                norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
            )  # fmt: skip
            conv.norm = None
    return backbone


def _has_statistics(norm: nn.Module | None) -> bool:
    if not isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
        return False
    return norm.running_mean is not None


def _autocast_dtype(name: str) -> torch.dtype | None:
    if name not in AUTOCAST:
        known = ", ".join(map(repr, AUTOCAST))
        raise ConfigError(f"DISTILL.TEACHER.AUTOCAST: expected one of {known}, got {name!r}")
    return AUTOCAST[name]


def _unlike_channels(student: str, teacher: str) -> bool:
    if student != teacher and {student, teacher} != {"RGB", "BGR"}:
        raise ConfigError(
            f"INPUT.FORMAT: {student!r} of the student and {teacher!r} of the teacher are "
            "incompatible; each must be 'RGB' or 'BGR'"
        )
    return student != teacher
