"""CKA between layers, as a table and as a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pcka.extras import names_as_they_are, optional_package
from pcka.files import atomic_write

_MOST_LABELS = 40  # per axis; more would be illegible
_MOST_FIGURES = 12  # layers per axis up to which values are written into the cells
_INCHES = 0.24  # per labelled row


@dataclass(frozen=True)
class CKATable:
    """CKA between all layers of one model and all layers of another.

    Attributes:
        values: ``(layers of a, layers of b)``, float64.
        layers_a: names of the rows.
        layers_b: names of the columns.
    """

    values: Tensor
    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]

    def write_csv(self, path: str | Path) -> None:
        """Write the values below a header of b's layers, each row after the name of a's layer."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["layer", *self.layers_b])
        for name, row in zip(self.layers_a, self.values.tolist()):
            writer.writerow([name, *(f"{value:.6f}" for value in row)])
        atomic_write(lambda file: file.write(text.getvalue().encode()), path)

    def plot(self, path: str | Path, name_a: str = "a", name_b: str = "b", title: str = "") -> None:
        """Save :meth:`figure`; the suffix of ``path`` determines the format."""
        figure = self.figure(name_a, name_b, title)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)

    def figure(self, name_a: str = "a", name_b: str = "b", title: str = "") -> Any:
        """Draw the table as a heatmap: the first layers at the bottom left, colours from 0 to 1.

        Args:
            name_a: name of the model of the rows.
            name_b: name of the model of the columns.
            title: shown above the table.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return tables_figure({title: self}, name_a, name_b)

    @property
    def inches(self) -> tuple[float, float]:
        """Width and height that the cells and labels need."""
        rows, columns = self.values.shape
        sides = [max(2.5, _INCHES * min(count, _MOST_LABELS)) for count in (columns, rows)]
        longest = [max(map(len, names)) for names in (self.layers_a, self.layers_b)]
        # Room for the labels, which are vertical below the table.
        return sides[0] + 0.07 * longest[0] + 0.5, sides[1] + 0.07 * longest[1] + 0.9

    def draw(self, axes: Any, name_a: str, name_b: str, title: str) -> Any:
        """Draw :meth:`figure` into matplotlib axes; return the image, for a colour bar."""
        image = axes.imshow(
            self.values.numpy(), origin="lower", aspect="auto", vmin=0, vmax=1, cmap="magma"
        )
        _label(axes.set_xticks, self.layers_b, rotation=90)
        _label(axes.set_yticks, self.layers_a)
        axes.set(xlabel=name_b, ylabel=name_a, title=title)
        if max(self.values.shape) <= _MOST_FIGURES:
            self._write_figures(axes)
        return image

    def _write_figures(self, axes: Any) -> None:
        for row, values in enumerate(self.values.tolist()):
            for column, value in enumerate(values):
                colour = "black" if value > 0.6 else "white"
                style = {"ha": "center", "va": "center", "color": colour, "fontsize": "x-small"}
                axes.text(column, row, f"{value:.2f}", **style)


@names_as_they_are
def tables_figure(tables: Mapping[str, CKATable], name_a: str, name_b: str) -> Any:
    """Draw tables of one shape side by side, with one colour scale; see :meth:`CKATable.figure`.

    Args:
        tables: title -> table.
        name_a: name of the model of the rows.
        name_b: name of the model of the columns.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figures = optional_package("matplotlib.figure", "train")
    sizes = [table.inches for table in tables.values()]
    size = sum(width for width, _ in sizes) + 1.1, max(height for _, height in sizes)
    figure = figures.Figure(figsize=size, layout="constrained")
    row = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, (title, table) in zip(row, tables.items()):
        image = table.draw(axes, name_a, name_b, title)
    figure.colorbar(image, ax=list(row), label="CKA")
    return figure


def _label(set_ticks: Callable[..., object], names: Sequence[str], **style: Any) -> None:
    """Label every layer, or every second, third, ... if there are too many."""
    shown = range(0, len(names), -(-len(names) // _MOST_LABELS))
    set_ticks(shown, [names[index] for index in shown], fontsize="x-small", **style)
