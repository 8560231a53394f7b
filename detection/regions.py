"""Box heads on given proposals, as read by the losses that compare regions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, ImageList
from torch import Tensor, nn

from pcka.losses.heads import RegionHead

Maps = Mapping[str, Tensor]


class RegionParts:
    """The box head of a Faster or Mask R-CNN, run on given proposals.

    Args:
        detector: is not modified, and is not part of this object's state.
        proposals: number of top proposals used per image.

    Raises:
        ValueError: the detector has no single box head.
    """

    def __init__(self, detector: nn.Module, proposals: int) -> None:
        heads: Any = getattr(detector, "roi_heads", None)
        if type(heads) is not StandardROIHeads:
            kind = type(detector if heads is None else heads).__name__
            raise ValueError(
                f"{kind} has no single box head for all proposals; use a GeneralizedRCNN with "
                "MODEL.ROI_HEADS.NAME StandardROIHeads"
            )
        self.detector: Any = detector
        self.heads = heads
        self.proposals = proposals

    @property
    def encoding(self) -> tuple[float, ...]:
        """Factors of the centre and size shifts."""
        return tuple(self.heads.box_predictor.box2box_transform.weights)

    @contextmanager
    def watched(self) -> Iterator[RegionWatch]:
        """Record the backbone's maps while the block runs the detector once."""
        watch = RegionWatch(self)
        handle = self.detector.backbone.register_forward_hook(watch.keep)
        try:
            yield watch
        finally:
            handle.remove()

    def teach(self, maps: Maps, sizes: Sequence[tuple[int, int]]) -> RegionHead:
        """Return the head's outputs for the detector's own proposals, with the proposals.

        Args:
            maps: the backbone's maps.
            sizes: height and width of each image.
        """
        images = ImageList(torch.empty(0), list(sizes))
        found, _ = self.detector.proposal_generator(images, maps)
        return self._judged(maps, [image.proposal_boxes[: self.proposals] for image in found])

    def run(self, maps: Maps, lesson: RegionHead) -> RegionHead:
        """Return the head's outputs for the proposals of another head's outputs."""
        return self._judged(maps, lesson.proposals)

    def _judged(self, maps: Maps, proposals: Sequence[Boxes]) -> RegionHead:
        heads = self.heads
        # Pool in float32: boxes are cast to the maps' dtype, and bfloat16 would shift them.
        features = [maps[level].float() for level in heads.box_in_features]
        pooled = heads.box_head(heads.box_pooler(features, list(proposals)))
        logits, deltas = heads.box_predictor(pooled)
        return RegionHead(logits, deltas.unflatten(1, (-1, 4)), proposals)


class RegionWatch:
    """The maps that a detector's backbone returned in one run."""

    def __init__(self, parts: RegionParts) -> None:
        self._parts = parts
        self._maps: Maps = {}

    def keep(self, _: nn.Module, inputs: object, maps: Maps) -> None:
        """Forward hook of the backbone."""
        self._maps = maps

    def given(self, lesson: RegionHead) -> RegionHead:
        """Return the head's outputs for the teacher's proposals."""
        return self._parts.run(self._maps, lesson)
