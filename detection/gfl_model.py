"""GFL for inference, a detector that detectron2 lacks.

This file is self-contained: exports include a copy, so that a student runs without this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn


class GFLHead(RetinaNetHead):
    """Two branches, one of which predicts a distribution over the distance to each edge of a box.

    Args:
        input_shape: shape of each level.
        conv_dims: output channels of each convolution in a branch.
        reg_max: the largest distance, in strides; the distances are the integers from 0 to it.
        keywords: passed to :class:`RetinaNetHead`.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        conv_dims: Sequence[int],
        reg_max: int = 16,
        **keywords: Any,
    ) -> None:
        super().__init__(
            input_shape=list(input_shape), conv_dims=list(conv_dims), num_anchors=1, **keywords
        )
        self.bbox_pred = nn.Conv2d(conv_dims[-1], 4 * (reg_max + 1), 3, padding=1)
        nn.init.normal_(self.bbox_pred.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.bbox_pred.bias))
        self.scales = nn.Parameter(torch.ones(len(input_shape)))  # one per level

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps ``(B, C, H, W)`` of each level -> logits ``(B, K, H, W)`` and ``(B, 4 N, H, W)``."""
        logits, edges = super().forward(features)
        return logits, self.scaled(edges)

    def scaled(self, edges: Sequence[Tensor]) -> list[Tensor]:
        """Scale the edge logits of each level by that level's own factor."""
        return [scale * level for scale, level in zip(self.scales, edges)]


class GFLDetector(FCOS):
    """GFL (Li et al., "Generalized Focal Loss", NeurIPS 2020), for inference.

    It uses FCOS's points, predicts the distances to a box's edges as means of distributions, and
    includes the box's quality in its class score instead of using a centerness.

    Args:
        reg_max: as in its :class:`GFLHead`.
        keywords: passed to detectron2's FCOS.
    """

    places: Tensor

    def __init__(self, *, reg_max: int = 16, **keywords: Any) -> None:
        super().__init__(**keywords)
        shapes = self.backbone.output_shape()
        strides = [shapes[level].stride for level in self.head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[stride] for stride in strides],
            aspect_ratios=[1.0],
            strides=strides,
            offset=0.0,  # as in the authors' code, points lie at the corner of a cell
        )
        self.register_buffer("places", torch.arange(reg_max + 1.0), persistent=False)

    @property
    def numbers(self) -> int:
        """Number of the head's edge outputs per point, ``4 N``."""
        return 4 * len(self.places)

    def distances(self, edges: Tensor) -> Tensor:
        """Means of the distributions, ``(..., 4, N)`` -> ``(..., 4)``, in strides."""
        return (edges.softmax(-1) * self.places).sum(-1)

    def forward_training(self, *_: object) -> dict[str, Tensor]:
        """Not supported without the project that this file comes from."""
        raise NotImplementedError("an exported GFL is for inference; train the original")

    def forward_inference(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: Sequence[Sequence[Tensor]],
    ) -> list[Instances]:
        """Return the detections of each image."""
        logits, edges = self._transpose_dense_predictions(
            predictions, [self.num_classes, self.numbers]
        )
        anchors = self.anchor_generator(features)
        return [
            self.inference_single_image(
                anchors,
                [level[image].sigmoid() for level in logits],
                [self.distances(level[image].unflatten(-1, (4, -1))) for level in edges],
                size,
            )
            for image, size in enumerate(images.image_sizes)
        ]
