"""Detections of several models on the same images, beside the truth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

LEAST_SCORE = 0.3
INCHES = 3.0


@torch.no_grad()
def draw_detections(
    cfg: CfgNode, models: Mapping[str, nn.Module], path: Path, images: int = 3
) -> None:
    """Write a picture with a row for each image and a column for the truth and for each model.

    Args:
        cfg: ``DATASETS.TEST`` (its first set) and the loader's keys are read.
        models: column title -> detectron2 detector.
        path: picture to write.
        images: number of images, the first ones of the set.
    """
    name = cfg.DATASETS.TEST[0]
    entries = [batch[0] for batch, _ in zip(build_detection_test_loader(cfg, name), range(images))]
    classes = MetadataCatalog.get(name).thing_classes
    truths = {entry["file_name"]: entry for entry in DatasetCatalog.get(name)}
    figure = Figure(
        figsize=(INCHES * (len(models) + 1), INCHES * len(entries)), layout="constrained"
    )
    grid = figure.subplots(len(entries), len(models) + 1, squeeze=False)
    for row, entry in zip(grid, entries):
        picture = read_image(entry["file_name"], "RGB")
        annotations = truths[entry["file_name"]]["annotations"]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        labels = [classes[a["category_id"]] for a in annotations]
        _draw(row[0], picture, Boxes(torch.tensor(boxes).view(-1, 4)), labels)
        for axes, model in zip(row[1:], models.values()):
            found = model.eval()([entry])[0]["instances"].to("cpu")
            found = found[found.scores >= LEAST_SCORE]
            found = found[found.scores.argsort()]  # the surest label is drawn last, on top
            pairs = zip(found.pred_classes.tolist(), found.scores.tolist())
            labels = [f"{classes[index]} {score:.2f}" for index, score in pairs]
            _draw(axes, picture, found.pred_boxes, labels)
    for axes, title in zip(grid[0], ("truth", *models)):
        axes.set_title(title)
    figure.savefig(path, dpi=100)


def _draw(axes: Axes, picture: np.ndarray, boxes: Boxes, labels: list[str]) -> None:
    axes.imshow(picture)
    axes.set_axis_off()
    for (left, top, right, bottom), label in zip(boxes.tensor.tolist(), labels):
        size = right - left, bottom - top
        axes.add_patch(Rectangle((left, top), *size, fill=False, edgecolor="#E69F00"))
        axes.text(left, top, label, color="white", fontsize="xx-small", backgroundcolor="#0072B2")
