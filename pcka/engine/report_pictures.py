"""Pictures of classifiers' predictions: confusion, reliability, per-class accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from pcka.analysis.predictions import Bin
from pcka.extras import names_as_they_are

MOST_NAMES = 25  # classes named on an axis; more would be illegible
MOST_FIGURES = 12  # classes in a confusion matrix with shares written in its cells
LEAST_SPREAD = 10.0  # least range of an axis in percent
SIZE = (5.0, 4.4)  # inches

Style = tuple[str, str]  # colour, dash


@names_as_they_are
def confusion_figure(confusion: np.ndarray, classes: Sequence[str]) -> Figure:
    """Heatmap of the share of each label's images (row) that got each prediction (column).

    Args:
        confusion: counts ``(C, C)``, by label and prediction.
        classes: class names.
    """
    totals = confusion.sum(1, keepdims=True)
    shares = 100 * confusion / np.maximum(totals, 1)
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    # On a square-root scale, so that a few per cent of errors are visible next to the diagonal.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
    axes.set(xlabel="predicted", ylabel="label")
    if len(classes) <= MOST_NAMES:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize="x-small")
        axes.set_yticks(range(len(classes)), classes, fontsize="x-small")
    if len(classes) <= MOST_FIGURES:
        for (row, column), share in np.ndenumerate(shares):
            if confusion[row, column]:
                colour = "white" if share > 40 else "black"
                text = axes.text(column, row, f"{share:.0f}", color=colour, fontsize="xx-small")
                text.set(ha="center", va="center")
    figure.colorbar(image, ax=axes, label="share of the label's images (%)")
    return figure


@names_as_they_are
def reliability_figure(bins: Mapping[str, Sequence[Bin]], styles: Mapping[str, Style]) -> Figure:
    """Accuracy against confidence of each model (top), share of images by confidence (bottom).

    Args:
        bins: name -> confidence bins.
        styles: name -> colour and line style.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="black", linewidth=0.8, label="calibrated")
    for name, of_model in bins.items():
        colour, dash = styles[name]
        filled = [b for b in of_model if b.images]
        points = [b.confidence for b in filled], [b.accuracy for b in filled]
        above.plot(*points, color=colour, linestyle=dash, marker="o", markersize=4, label=name)
        total = max(sum(b.images for b in of_model), 1)
        edges = [b.low for b in of_model] + [1.0]
        shares = [100 * b.images / total for b in of_model]
        below.stairs(shares, edges, color=colour, linestyle=dash)
    above.set(ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    above.legend(fontsize="small")
    below.set(xlabel="confidence", ylabel="images (%)")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


@names_as_they_are
def class_figure(
    accuracies: Mapping[str, Sequence[float | None]],
    classes: Sequence[str],
    styles: Mapping[str, Style],
    unit: str = "accuracy (%)",
) -> Figure:
    """One row per class with one point per model, joined by a line.

    Classes are sorted by the last model's value, best on top; if there are more than
    :data:`MOST_NAMES`, the axis counts them.

    Args:
        accuracies: name -> value of each class, in the order of ``classes``; None: there is none.
        classes: class names.
        styles: name -> colour and line style.
        unit: of the values.
    """
    last = [-1.0 if figure is None else figure for figure in list(accuracies.values())[-1]]
    order = sorted(range(len(classes)), key=last.__getitem__)
    named = len(classes) <= MOST_NAMES
    height = 0.9 + 0.24 * len(classes) if named else SIZE[1]
    figure = Figure(figsize=(SIZE[0], max(height, 2.0)), layout="constrained")
    axes = figure.subplots()
    if named:
        for row, index in enumerate(order):
            known = [v for by_class in accuracies.values() if (v := by_class[index]) is not None]
            axes.plot([min(known, default=0), max(known, default=0)], [row, row], color="#bbbbbb")
    # The first ones are larger and hollow, so that equal values do not hide one another.
    step = 3.0 if len(accuracies) <= 4 else 1.5
    sizes = [4 + step * i if named else 3.0 for i in range(len(accuracies), 0, -1)]
    for size, (name, by_class) in zip(sizes, accuracies.items()):
        points = [(v, row) for row, c in enumerate(order) if (v := by_class[c]) is not None]
        if not points:
            continue
        fill = "none" if named else "full"
        (line,) = axes.plot(*zip(*points), "o", fillstyle=fill, markersize=size, label=name)
        line.set_color(styles[name][0])
    low, high = axes.get_xlim()
    if high - low < LEAST_SPREAD:  # so that small differences look small
        middle = (low + high) / 2
        axes.set_xlim(middle - LEAST_SPREAD / 2, middle + LEAST_SPREAD / 2)
    if named:
        axes.set_yticks(range(len(order)), [classes[index] for index in order], fontsize="small")
        axes.set_ylim(-0.6, len(order) - 0.4)
    else:
        axes.set_ylabel(f"classes, worst of {list(accuracies)[-1]} at the bottom")
    axes.set(xlabel=unit)
    axes.grid(alpha=0.3)
    # Above the rows, where it cannot hide points.
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    return figure
