"""Similarity of a student's layers to those of other models over the training epochs."""

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

MOST_CURVES = 6  # per panel, told apart by colour; more layers are drawn as a heatmap


@dataclass(frozen=True)
class EpochCKA:
    """CKA of a student's layers with other models, at some epochs.

    Attributes:
        epochs: in order; 0 is the start of training.
        layers: of the student.
        values: model compared with -> ``(layers, epochs)``, float64.
        partners: if the most similar of several layers counts: key of ``values`` -> which layer it
            was, for each layer a tuple of one name per epoch.
    """

    epochs: tuple[int, ...]
    layers: tuple[str, ...]
    values: Mapping[str, Tensor]
    partners: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)

    def write_csv(self, path: Path) -> None:
        """Write one row per layer and model compared with, and one column per epoch.

        Rows with the names of the most similar layers follow.
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
        """Draw a panel per model: curves for a few layers, else a heatmap, first layer lowest.

        The suffix of ``path`` determines the format.
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
