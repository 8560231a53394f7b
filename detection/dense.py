"""Dense heads in parts, as read by the losses that compare predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes
from torch import Tensor, nn

from detection.gfl_model import GFLDetector, GFLHead
from detection.reppoints_model import RepPointsDetector
from pcka.losses.heads import Dense, DenseHead, Inner

BRANCHES = {"cls": ("cls_subnet", "cls_score"), "box": ("bbox_subnet", "bbox_pred")}
Maps = Sequence[Tensor]


class DenseParts:
    """The head of a dense detector: its predictions, its inner maps, and the layers after them.

    Args:
        detector: a RetinaNet, FCOS, GFL or RepPoints; it is not modified, and is not part of this
            object's state.
        depth: number of convolutions in a branch before the inner maps, which are taken before the
            last one's ReLU; 0: no inner maps.
        predictions: whether to return the head's own predictions.

    Raises:
        ValueError: the detector is of another kind, or its head has fewer convolutions.
    """

    def __init__(self, detector: nn.Module, depth: int = 0, *, predictions: bool = True) -> None:
        if not isinstance(detector, RetinaNet | FCOS):
            raise ValueError(
                f"{type(detector).__name__} has no dense head; use a RetinaNet, FCOS, GFL or "
                "RepPoints"
            )
        if depth and isinstance(detector, RepPointsDetector):
            raise ValueError(
                "the last layers of a RepPoints head see both branches; use DENSEKD, which "
                "compares its predictions"
            )
        self.detector: Any = detector
        self.predictions = predictions
        self.split = {
            branch: _layers_of(getattr(self.detector.head, subnet), depth)
            for branch, (subnet, _) in BRANCHES.items()
            if depth
        }

    @contextmanager
    def watched(self) -> Iterator[DenseWatch]:
        """Record the head's outputs while the block runs the detector, or its head, once."""
        watch, head = DenseWatch(self), self.detector.head
        handles = [head.register_forward_hook(watch.keep_output)] if self.predictions else []
        for branch, layers in self.split.items():
            last = getattr(head, BRANCHES[branch][0])[layers - 1]
            handles.append(last.register_forward_hook(partial(watch.keep_inner, branch)))
        try:
            yield watch
        finally:
            for handle in handles:
                handle.remove()

    def teach(self, maps: Mapping[str, Tensor], _: object) -> DenseHead:
        """Return the head's outputs for a backbone's maps, with its layers after the inner maps."""
        return replace(self.run(maps), rest=self.rest if self.split else None)

    def run(self, maps: Mapping[str, Tensor], _: object = None) -> DenseHead:
        """Return the head's outputs for the maps of a backbone."""
        with self.watched() as watch:
            self.detector.head([maps[level] for level in self.detector.head_in_features])
        return watch.given()

    def rest(self, inner: Inner) -> Dense:
        """Return what the layers after the inner maps predict from such maps.

        Each layer is given all levels in order, as per-level batch norms require.
        """
        head, found = self.detector.head, []
        for branch, (subnet, last) in BRANCHES.items():
            layers = getattr(head, subnet)[self.split[branch] :]
            found.append([getattr(head, last)(layers(x)) for x in inner[branch]])
        logits, shifts = found
        return self.decoded(logits, head.scaled(shifts) if isinstance(head, GFLHead) else shifts)

    def decoded(self, logits: Maps, shifts: Maps) -> Dense:
        """Return the logits and boxes of all levels.

        Args:
            logits: ``(B, A * K, H, W)`` for each level.
            shifts: ``(B, A * 4, H, W)`` for each level, relative to the anchors; for GFL ``(B, 4 *
                N, H, W)``, for RepPoints ``(B, 2 * n, H, W)``.
        """
        model, distributions = self.detector, None
        anchors = Boxes.cat(model.anchor_generator(logits)).tensor
        numbers = getattr(model, "numbers", 4)
        rows = torch.cat([permute_to_N_HWA_K(x, numbers) for x in shifts], 1).float()
        if isinstance(model, GFLDetector):
            distributions = rows.unflatten(-1, (4, -1))
            rows = model.distances(distributions)
        elif isinstance(model, RepPointsDetector):
            rows = model.corners(rows)
        boxes = [model.box2box_transform.apply_deltas(image, anchors) for image in rows]
        classes = [permute_to_N_HWA_K(x, model.num_classes) for x in logits]
        return Dense(torch.cat(classes, 1), torch.stack(boxes), distributions)


class DenseWatch:
    """The outputs of a dense head in one run."""

    def __init__(self, parts: DenseParts) -> None:
        self._parts = parts
        self._output: tuple[Maps, ...] = ()
        self._inner: dict[str, list[Tensor]] = {branch: [] for branch in parts.split}

    def keep_output(self, _: nn.Module, inputs: object, output: tuple[Maps, ...]) -> None:
        """Forward hook of the head."""
        self._output = output

    def keep_inner(self, branch: str, _: nn.Module, inputs: object, output: Tensor) -> None:
        """Forward hook of a layer within the head, called for one level after another."""
        self._inner[branch].append(output)

    def given(self, _: object = None) -> DenseHead:
        """The recorded outputs, as the losses take them."""
        own = self._parts.decoded(*self._output[:2]) if self._output else None
        return DenseHead(own, self._inner)


def _layers_of(subnet: nn.Sequential, depth: int) -> int:
    """Count a branch's layers up to its ``depth``-th convolution and norm, excluding its ReLU."""
    ends = [index for index, layer in enumerate(subnet) if isinstance(layer, nn.ReLU)]
    if depth > len(ends):
        raise ValueError(
            f"a branch of its head has {len(ends)} convolution(s) before the last one, so DEPTH "
            f"{depth} is too large; the largest is {len(ends)}"
        )
    return ends[depth - 1]
