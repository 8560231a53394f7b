"""How alike the layers of a student are to other models', over the epochs of its training."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from pcka.analysis.cka_table import CKATable, tables_figure
from pcka.engine.curves import Panel, plot_panels
from pcka.engine.run_folder import write_text

MOST_CURVES = 6  # of a panel, told apart by their colours; more layers are a heatmap


@dataclass(frozen=True)
class EpochCKA:
    """CKA of a student's layers in some epochs with other models.

    Attributes:
        epochs: in their order, the start being 0.
        layers: of the student.
        values: with what they are compared -> ``(layers, epochs)``, float64.
        partners: where the most alike of several layers counts: its name -> which one it was, a
            tuple of as many names as epochs for each layer.
    """

    epochs: tuple[int, ...]
    layers: tuple[str, ...]
    values: Mapping[str, Tensor]
    partners: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)

    def write_csv(self, path: Path) -> None:
        """Write a row for each layer and what it is compared with, a column for each epoch.

        Rows of names follow, of those that were the most alike.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["with", "layer", *self.epochs])
        for name, table in self.values.items():
            for layer, row in zip(self.layers, table.tolist()):
                writer.writerow([name, layer, *(f"{value:.6f}" for value in row)])
        for name, found in self.partners.items():
            for layer, others in zip(self.layers, found):
                writer.writerow([f"{name}: which", layer, *others])
        write_text(path, text.getvalue())

    def plot(self, path: Path) -> None:
        """Draw a panel for each model: curves of a few layers, or a heatmap, the first one below.

        The suffix of ``path`` picks the format.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        titles = {name: f"CKA with the {name}" for name in self.values}
        if len(self.layers) <= MOST_CURVES:
            panels = [
                Panel(titles[name], "CKA", self._curves(table), top=1.02)
                for name, table in self.values.items()
            ]
            plot_panels(panels, path, x="epoch")
            return
        columns = tuple(map(str, self.epochs))
        tables = {
            titles[name]: CKATable(table, self.layers, columns)
            for name, table in self.values.items()
        }
        tables_figure(tables, "layer of the student", "epoch").savefig(path, dpi=120)

    def _curves(self, table: Tensor) -> dict[str, list[tuple[float, float]]]:
        return {
            layer: list(zip(map(float, self.epochs), row))
            for layer, row in zip(self.layers, table.tolist())
        }
