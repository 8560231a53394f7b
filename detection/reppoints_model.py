"""RepPoints for inference, a detector that detectron2 lacks.

This file is self-contained: exports include a copy, so that a student runs without this project.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

EPSILON = 1e-12  # added to a variance, whose square root has no derivative at 0


class RepPointsHead(RetinaNetHead):
    """An object's points at every place, in two steps: a convolution, then a look at its points.

    Args:
        input_shape: shape of each level.
        conv_dims: output channels of each convolution in a branch.
        num_classes: ``K``.
        prior_prob: initial probability of an object at a place.
        side: odd; there are ``n = side ** 2`` points.
        gradient_factor: factor on the second step's gradient through the first points.
        keywords: passed to :class:`RetinaNetHead`.
    """

    base: Tensor

    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        conv_dims: Sequence[int],
        num_classes: int,
        prior_prob: float = 0.01,
        side: int = 3,
        gradient_factor: float = 0.1,
        **keywords: Any,
    ) -> None:
        super().__init__(
            input_shape=list(input_shape),
            conv_dims=list(conv_dims),
            num_classes=num_classes,
            num_anchors=1,
            **keywords,
        )
        width, numbers = conv_dims[-1], 2 * side**2
        self.gradient_factor = gradient_factor
        self.initial = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, numbers, 1)
        )
        self.cls_look = DeformConv2d(width, width, side, padding=side // 2, bias=False)
        self.point_look = DeformConv2d(width, width, side, padding=side // 2, bias=False)
        self.cls_score = nn.Conv2d(width, num_classes, 1)
        self.bbox_pred = nn.Conv2d(width, numbers, 1)
        for module in (*self.initial, self.cls_look, self.point_look, self.bbox_pred):
            if not isinstance(module, nn.ReLU):
                nn.init.normal_(cast(Tensor, module.weight), std=0.01)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(cast(Tensor, module.bias))
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.constant_(
            cast(Tensor, self.cls_score.bias), -math.log((1 - prior_prob) / prior_prob)
        )
        steps = torch.arange(side) - side // 2
        base = torch.cartesian_prod(steps, steps).float()  # y, x: a convolution's sampling grid
        self.register_buffer("base", base.view(1, -1, 1, 1), persistent=False)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Maps ``(B, C, H, W)`` of each level -> logits ``(B, K, H, W)``, points, first points.

        Points are ``(B, 2 n, H, W)``: y and x of each, in strides relative to the place.
        """
        found = [self._level(feature) for feature in features]
        logits, points, first = (list(maps) for maps in zip(*found))
        return logits, points, first

    def _level(self, feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, places = self.cls_subnet(feature), self.bbox_subnet(feature)
        first = self.initial(places).float()
        shared = self.gradient_factor
        offsets = (1 - shared) * first.detach() + shared * first - self.base
        logits = self.cls_score(F.relu(_look(self.cls_look, scores, offsets)))
        points = self.bbox_pred(F.relu(_look(self.point_look, places, offsets)))
        return logits, points + first.detach(), first


def _look(layer: DeformConv2d, x: Tensor, offsets: Tensor) -> Tensor:
    """Run in the weights' dtype: torchvision's kernels take one, and bfloat16 shifts points."""
    dtype = layer.weight.dtype
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, layer(x.to(dtype), offsets.to(dtype)))


class CornerTransform:
    """Boxes given by their corners, in strides from the centre of a square."""

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Corners and squares of one stride, ``(R, 4)`` each -> ``(R, 4)`` in pixels."""
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        return centers.repeat(1, 2) + deltas * (boxes[:, 2:3] - boxes[:, :1])


class RepPointsDetector(FCOS):
    """RepPoints (Yang et al., ICCV 2019), for inference.

    It uses FCOS's places, each with the box around the points predicted there.

    Args:
        transform: ``"moment"``: the box's centre is the points' mean, its half extents are their
            standard deviations, each times a learned factor; ``"minmax"``: their bounding box.
        moment_factor: factor on the gradient of the learned factors.
        keywords: passed to detectron2's FCOS.
    """

    def __init__(
        self, *, transform: str = "moment", moment_factor: float = 0.01, **keywords: Any
    ) -> None:
        super().__init__(**keywords, box2box_transform=CornerTransform())
        if transform not in ("moment", "minmax"):
            raise ValueError(f"transform must be 'moment' or 'minmax', got {transform!r}")
        self.transform, self.moment_factor = transform, moment_factor
        if transform == "moment":  # log of half extent over standard deviation, x and y
            self.moment = nn.Parameter(torch.zeros(2))
        shapes = self.backbone.output_shape()
        strides = [shapes[level].stride for level in self.head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[stride] for stride in strides],
            aspect_ratios=[1.0],
            strides=strides,
            offset=0.0,  # as in the authors' code, places lie at the corner of a cell
        )

    @property
    def numbers(self) -> int:
        """Number of the head's point outputs per place, ``2 n``."""
        return self.head.bbox_pred.out_channels

    def corners(self, points: Tensor) -> Tensor:
        """Points ``(..., 2 n)`` -> their box ``(..., 4)``: x0, y0, x1, y1, in strides."""
        y, x = points.unflatten(-1, (-1, 2)).unbind(-1)
        if self.transform == "minmax":
            return torch.stack([x.amin(-1), y.amin(-1), x.amax(-1), y.amax(-1)], -1)
        own = self.moment_factor
        slow = own * self.moment + (1 - own) * self.moment.detach()
        half = [(z.var(-1) + EPSILON).sqrt() * factor for z, factor in zip((x, y), slow.exp())]
        return torch.stack(
            [z.mean(-1) + sign * h for sign in (-1, 1) for z, h in zip((x, y), half)], -1
        )

    def forward_training(self, *_: object) -> dict[str, Tensor]:
        """Not supported without the project that this file comes from."""
        raise NotImplementedError("an exported RepPoints is for inference; train the original")

    def forward_inference(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: Sequence[Sequence[Tensor]],
    ) -> list[Instances]:
        """Return the detections of each image."""
        logits, points = self._transpose_dense_predictions(
            predictions[:2], [self.num_classes, self.numbers]
        )
        anchors = self.anchor_generator(features)
        return [
            self.inference_single_image(
                anchors,
                [level[image].sigmoid() for level in logits],
                [self.corners(level[image]) for level in points],
                size,
            )
            for image, size in enumerate(images.image_sizes)
        ]
