"""Semantic segmentation heads, as the losses and the taps read them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from pcka.losses.heads import PixelHead

LEVEL = "sem_seg"  # a level besides the backbone's: the input of the head's last layer
TAP = "sem_seg_head.predictor:input"  # its path in a student
NO_CLASS = -1
Maps = Mapping[str, Tensor]


class PixelParts:
    """The head of a SemanticSegmentor or a PanopticFPN: class scores and their input map.

    Args:
        model: is not modified, and is not part of this object's state. Its ``sem_seg_head`` has
            ``layers(maps)``, which end in a ``predictor``, as in detectron2's and this project's
            heads.

    Raises:
        ValueError: the model has no such head.
    """

    def __init__(self, model: nn.Module) -> None:
        head: Any = getattr(model, "sem_seg_head", None)
        if not all(hasattr(head, part) for part in ("layers", "predictor", "common_stride")):
            raise ValueError(
                f"{type(model).__name__} gives no readable classes of pixels; use a "
                "SemanticSegmentor with MODEL.SEM_SEG_HEAD.NAME SemSegFPNHead, PSPHead or ASPPHead"
            )
        self.head = head

    @property
    def shape(self) -> ShapeSpec:
        """Channels and stride of the last layer's input."""
        return ShapeSpec(channels=self.head.predictor.in_channels, stride=self.head.common_stride)

    @contextmanager
    def watched(self) -> Iterator[PixelWatch]:
        """Record the head's outputs while the block runs the model, or its head, once."""
        watch = PixelWatch(self.head.ignore_value)
        handles = [
            self.head.register_forward_pre_hook(watch.keep_labels),
            self.head.predictor.register_forward_hook(watch.keep_scores),
        ]
        try:
            yield watch
        finally:
            for handle in handles:
                handle.remove()

    def run(self, maps: Maps, _: object = None) -> PixelHead:
        """Return the head's outputs for the maps of a backbone."""
        with self.watched() as watch:
            self.head.layers(maps)
        return watch.given()

    def teach(self, maps: Maps, canvas: tuple[int, int]) -> PixelHead:
        """Return the head's outputs for whole maps, cropped to a canvas."""
        found, stride = self.run(maps), self.head.common_stride
        rows, columns = (math.ceil(side / stride) for side in canvas)
        return PixelHead(*(x[:, :, :rows, :columns] for x in (found.logits, found.features)))


class PixelWatch:
    """The inputs and outputs of a head in one run."""

    def __init__(self, ignored: int) -> None:
        self._ignored = ignored
        self._labels: Tensor | None = None
        self._scores: tuple[Tensor, Tensor] | None = None

    def keep_labels(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        """Forward pre-hook of the head, whose inputs are maps and the classes of pixels."""
        labels = given[1] if len(given) > 1 else None
        if labels is not None:
            self._labels = labels.masked_fill(labels == self._ignored, NO_CLASS)

    def keep_scores(self, _: nn.Module, given: tuple[Tensor], logits: Tensor) -> None:
        """Forward hook of the head's last layer."""
        self._scores = logits, given[0]

    def given(self, _: object = None) -> PixelHead:
        """The recorded values, as the losses take them."""
        assert self._scores is not None  # the model ran
        return PixelHead(*self._scores, self._labels)


def names_pixels(levels: Sequence[object]) -> bool:
    """Whether ``DISTILL.LEVELS`` includes the head's level."""
    return any(LEVEL in str(entry).split(":") for entry in levels)


def pixel_shape(model: nn.Module) -> dict[str, ShapeSpec]:
    """Return the level of a model's head, {} if there is none."""
    try:
        return {LEVEL: PixelParts(model).shape}
    except ValueError:
        return {}
