"""Figures of Grams: teacher, student and their difference."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from pcka.analysis.gram_pairs import GramPair
from pcka.extras import names_as_they_are, optional_package

COLOURS = "RdBu_r"  # white is 0, red positive, blue negative
_INCHES = 2.7  # per side of a Gram
_MOST_LINES = 30  # blocks per axis up to which lines separate them; more would hide the Gram
_MOST_NAMES = 12  # classes per axis up to which they are named
NOTHING: Mapping[str, Any] = MappingProxyType({})


@names_as_they_are
def grams_figure(
    pairs: Mapping[str, GramPair],
    images: Mapping[str, np.ndarray] = NOTHING,
    classes: Mapping[str, int] = NOTHING,
) -> Any:
    """Draw one row per pair: teacher's Gram, student's Gram, student minus teacher.

    The three share one diverging colour scale, symmetric about 0, up to the largest absolute value
    off the diagonals of the two Grams; values beyond it are drawn in the last colour. The CKA of
    the pair, 1 minus the loss, is shown above the row. Lines separate the patches of one row of the
    map, or the samples of one class, from the next.

    Args:
        pairs: name of the level or stage -> its Grams.
        images: name -> ``(H, W, 3)`` uint8, drawn first in its row, with the patches.
        classes: for Grams of samples sorted by class: name -> number of samples, in that order.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figures = optional_package("matplotlib.figure", "train")
    columns = 3 + bool(images)
    size = _INCHES * columns + 0.8, (_INCHES + 0.7) * len(pairs)
    figure = figures.Figure(figsize=size, layout="constrained")
    parts = figure.subfigures(len(pairs), squeeze=False)[:, 0]
    for part, (name, pair) in zip(parts, pairs.items()):
        part.suptitle(f"{name}: CKA {pair.cka:.3f}")
        row = part.subplots(1, columns)
        if images:
            _draw_image(row[0], images[name], pair.grid or (1, 1))
        teacher, student = (gram.double().cpu().numpy() for gram in (pair.teacher, pair.student))
        limit, beyond = _scale(teacher, student)
        for axes, values in zip(row[-3:], (teacher, student, student - teacher)):
            drawn = axes.imshow(values, vmin=-limit, vmax=limit, cmap=COLOURS)
            _part(axes, len(values), pair.grid, classes)
            if axes is not row[-3]:
                axes.set_yticks([])  # as on the first one
        titles = ("teacher", "student", "student \N{MINUS SIGN} teacher")
        for axes, title in zip(row[-3:], titles):
            axes.set_title(title, fontsize="medium")
        extend = "max" if beyond else "neither"
        bar = part.colorbar(drawn, ax=row[-1], extend=extend)
        bar.ax.tick_params(labelsize="x-small")
        bar.set_label("similarity", fontsize="small")
    return figure


def _scale(*grams: np.ndarray) -> tuple[float, bool]:
    """The limit of the colour scale, and whether a diagonal exceeds it."""
    off = [np.abs(gram[~np.eye(len(gram), dtype=bool)]).max(initial=0) for gram in grams]
    most = max(float(np.abs(gram).max(initial=0)) for gram in grams)
    limit = float(max(off)) or most or 1.0
    return limit, most > limit


def _draw_image(axes: Any, image: np.ndarray, grid: tuple[int, int]) -> None:
    height, width = image.shape[:2]
    axes.imshow(image)
    for set_lines, side, parts in ((axes.axhline, height, grid[0]), (axes.axvline, width, grid[1])):
        for part in range(1, parts):
            # Two lines, so that they are visible on any background.
            set_lines(side * part / parts - 0.5, color="black", linewidth=1.2)
            set_lines(side * part / parts - 0.5, color="white", linewidth=0.5)
    axes.set(xticks=[], yticks=[], xlabel=f"{grid[0]} x {grid[1]} patches")


def _part(axes: Any, rows: int, grid: tuple[int, int] | None, classes: Mapping[str, int]) -> None:
    """Draw lines between blocks of rows, and the names of the blocks if they have any."""
    counts = list(classes.values()) if grid is None else [grid[1]] * grid[0]
    ends = np.cumsum(counts)
    if len(counts) <= _MOST_LINES:
        for end in ends[:-1]:
            axes.axhline(end - 0.5, color="black", linewidth=0.4)
            axes.axvline(end - 0.5, color="black", linewidth=0.4)
    if grid is None and len(counts) <= _MOST_NAMES:
        middles = ends - np.array(counts) / 2 - 0.5
        axes.set_xticks(middles, list(classes), rotation=90, fontsize="x-small")
        axes.set_yticks(middles, list(classes), fontsize="x-small")
        axes.tick_params(length=0)
    else:
        axes.tick_params(labelsize="x-small")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(-0.5, rows - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
