"""Per-pixel classes of several models on the same images, next to the ground truth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.data.detection_utils import read_image
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn

from detection.data.mapper import make_mapper
from detection.data.pixels import Labels
from detection.data.targets import first_test_set
from pcka.modes import evaluation_mode

INCHES = 3.4
PALETTE = "tab20"
MOST_NAMED = 20  # classes in the legend: as many as the palette has colours


@torch.no_grad()
def pixels_figure(cfg: CfgNode, models: Mapping[str, nn.Module], images: int = 3) -> Figure:
    """Draw a row for each image, and columns for the image, its ground truth and each model.

    Args:
        cfg: ``DATASETS.TEST`` (its first set) and the loader's keys are read.
        models: column title -> detectron2 model that returns ``sem_seg``.
        images: number of images, taken from the start of the set.
    """
    name, labels = first_test_set(cfg), Labels.of(cfg)
    loader = build_detection_test_loader(cfg, name, mapper=make_mapper(cfg, training=False))
    entries = [batch[0] for batch, _ in zip(loader, range(images))]
    titles = ["image", "truth", *models]
    size = INCHES * len(titles), INCHES * len(entries) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(entries), len(titles), squeeze=False)
    for row, entry in zip(grid, entries):
        _show(row[0], read_image(entry["file_name"], "RGB"))
        truth = labels.read(entry["sem_seg_file_name"])
        _show(row[1], _coloured(truth, truth == labels.ignored))
        for axes, model in zip(row[2:], models.values()):
            with evaluation_mode(model):
                found = model([entry])[0]["sem_seg"].argmax(0).cpu().numpy()
            _show(axes, _coloured(found, truth == labels.ignored))
    for axes, title in zip(grid[0], titles):
        axes.set_title(title)
    classes = MetadataCatalog.get(name).get("stuff_classes", ())[:MOST_NAMED]
    colours = _colours(np.arange(len(classes)))
    handles = [Patch(color=to_hex(c), label=label) for c, label in zip(colours, classes)]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 11))
    return figure


def _colours(classes: np.ndarray) -> np.ndarray:
    palette = colormaps[PALETTE]
    return np.asarray(palette(classes % palette.N))


def _coloured(classes: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """``(H, W)`` classes -> ``(H, W, 3)`` colours; ignored pixels are white."""
    colours = _colours(classes)[..., :3].copy()
    colours[ignored] = 1
    return colours


def _show(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_axis_off()
