"""Detections of several models on the same images, next to the ground truth: hits and misses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor, nn

from detection.config import student_architecture
from detection.data.targets import SEGMENTER, first_test_set
from detection.pixel_pictures import pixels_figure
from pcka.modes import evaluation_mode

LEAST_SCORE = 0.3
MOST_DETECTIONS = 20  # per image
LEAST_OVERLAP = 0.5  # minimum IoU of a hit with its object, as in AP50
INCHES = 3.4
TRUTH, HIT, MISS = "#009E73", "#0072B2", "#D55E00"
SOLID, DASHED = "-", (0, (3, 2))


def draw_found(cfg: CfgNode, models: Mapping[str, nn.Module], path: Path, images: int = 3) -> None:
    """Write :func:`found_figure`; the suffix of ``path`` determines the format."""
    found_figure(cfg, models, images).savefig(path, dpi=100)


def found_figure(cfg: CfgNode, models: Mapping[str, nn.Module], images: int = 3) -> Figure:
    """Draw what each model finds: a semantic segmenter's classes of pixels, or detections."""
    of_pixels = student_architecture(cfg) == SEGMENTER
    return (pixels_figure if of_pixels else detections_figure)(cfg, models, images)


@torch.no_grad()
def detections_figure(cfg: CfgNode, models: Mapping[str, nn.Module], images: int = 3) -> Figure:
    """Draw a row for each image, and columns for the ground truth and each model.

    Args:
        cfg: ``DATASETS.TEST`` (its first set) and the loader's keys are read.
        models: column title -> detectron2 detector.
        images: number of images, taken from the start of the set.
    """
    name = first_test_set(cfg)
    entries = [batch[0] for batch, _ in zip(build_detection_test_loader(cfg, name), range(images))]
    truths = {entry["file_name"]: entry["annotations"] for entry in DatasetCatalog.get(name)}
    classes = MetadataCatalog.get(name).get("thing_classes", ())
    size = INCHES * (len(models) + 1), INCHES * len(entries) + 0.4
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(entries), len(models) + 1, squeeze=False)
    for row, entry in zip(grid, entries):
        picture = read_image(entry["file_name"], "RGB")
        boxes, kinds = _truth(truths[entry["file_name"]])
        _show(row[0], picture)
        _draw(row[0], boxes, [_named(kind, classes) for kind in kinds.tolist()], TRUTH)
        for axes, model in zip(row[1:], models.values()):
            with evaluation_mode(model):
                found = model([entry])[0]["instances"].to("cpu")
            _show(axes, picture)
            _draw_found(axes, _surest(found), boxes, kinds, classes)
    for axes, title in zip(grid[0], ("truth", *models)):
        axes.set_title(title)
    lines = [
        Line2D([], [], color=HIT, label="hit"),
        Line2D([], [], color=MISS, label="false alarm"),
        Line2D([], [], color=MISS, linestyle=DASHED, label="missed"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    return figure


def _surest(found: Instances) -> Instances:
    """The highest-scoring detections, few enough not to hide the picture."""
    found = found[found.scores >= LEAST_SCORE]
    return found[found.scores.argsort(descending=True)[:MOST_DETECTIONS]]


def match(found: Instances, boxes: Boxes, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Determine which detections are hits and which objects are found.

    In descending order of score, each detection takes the object of its class that it overlaps most
    among those not yet taken, if their IoU is at least :data:`LEAST_OVERLAP`.

    Args:
        found: detections with ``pred_boxes``, ``pred_classes`` and ``scores``.
        boxes: boxes of the objects.
        kinds: classes of the objects, ``(M,)`` int64.

    Returns:
        For each detection whether it is a hit, and for each object whether it is found; both bool.
    """
    overlaps = pairwise_iou(found.pred_boxes, boxes)
    overlaps[found.pred_classes[:, None] != kinds] = 0
    hits = torch.zeros(len(found), dtype=torch.bool)
    taken = torch.zeros(len(boxes), dtype=torch.bool)
    for index in found.scores.argsort(descending=True).tolist():
        free = overlaps[index].masked_fill(taken, 0)
        if len(free) and free.max() >= LEAST_OVERLAP:
            hits[index] = taken[free.argmax()] = True
    return hits, taken


def _truth(annotations: Sequence[Mapping[str, Any]]) -> tuple[Boxes, Tensor]:
    """Boxes and classes of the objects, without crowds."""
    single = [a for a in annotations if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in single]
    kinds = torch.tensor([a["category_id"] for a in single], dtype=torch.int64)
    return Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4)), kinds


def _named(kind: int, classes: Sequence[str]) -> str:
    return classes[kind] if kind < len(classes) else str(kind)


def _show(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture)
    axes.set_axis_off()


def _draw_found(
    axes: Axes, found: Instances, boxes: Boxes, kinds: Tensor, classes: Sequence[str]
) -> None:
    """Draw hits and false alarms with their scores, and the missed objects."""
    hits, taken = match(found, boxes, kinds)
    missed = [_named(kind, classes) for kind in kinds[~taken].tolist()]
    _draw(axes, boxes[~taken], missed, MISS, DASHED)
    for chosen, colour in ((~hits, MISS), (hits, HIT)):
        some = found[chosen]
        pairs = zip(some.pred_classes.tolist(), some.scores.tolist())
        labels = [f"{_named(kind, classes)} {score:.2f}" for kind, score in pairs]
        _draw(axes, some.pred_boxes, labels, colour)


def _draw(axes: Axes, boxes: Boxes, labels: Sequence[str], colour: str, dash: Any = SOLID) -> None:
    """Draw boxes with labels outside of them: above, or below where there is no room above."""
    outline = [withStroke(linewidth=2.5, foreground="white")]  # visible on any background
    width, height = max(axes.get_xlim()), max(axes.get_ylim())
    for (left, top, right, bottom), label in zip(boxes.tensor.tolist(), labels):
        size = right - left, bottom - top
        box = Rectangle((left, top), *size, fill=False, edgecolor=colour, linestyle=dash)
        box.set(linewidth=1.5, path_effects=outline)
        axes.add_patch(box)
        above = top > 0.06 * height
        inwards = left > 0.8 * width  # else the label would leave the picture
        text = axes.annotate(
            label,
            (right if inwards else left, top if above else bottom),
            horizontalalignment="right" if inwards else "left",
            xytext=(0, 1.5 if above else -1.5),
            textcoords="offset points",
            verticalalignment="bottom" if above else "top",
            color=colour,
            fontsize="small",
            path_effects=outline,
        )
        text.set_in_layout(False)
