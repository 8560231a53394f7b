from __future__ import annotations

import csv

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pcka.analysis import CKATable


def table(rows: int, columns: int) -> CKATable:
    values = torch.linspace(-0.01, 1, rows * columns, dtype=torch.float64).view(rows, columns)
    names = [tuple(f"layer{n}.conv, {n}" for n in range(count)) for count in (rows, columns)]
    return CKATable(values, *names)


def test_a_table_is_read_back_from_its_csv(tmp_path):
    written = table(2, 3)
    written.write_csv(tmp_path / "new" / "cka.csv")
    with open(tmp_path / "new" / "cka.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["layer", *written.layers_b]
    assert tuple(row[0] for row in rows) == written.layers_a
    read = torch.tensor([[float(cell) for cell in row[1:]] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(read, written.values, atol=1e-6, rtol=0)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """What ``plot`` draws, with its picture's size in pixels."""

    def draw(written: CKATable, **names: str):
        kept = []
        save = Figure.savefig
        monkeypatch.setattr(
            Figure, "savefig", lambda f, *a, **k: (kept.append(f), save(f, *a, **k))
        )
        written.plot(tmp_path / "new" / "cka.png", **names)
        with Image.open(tmp_path / "new" / "cka.png") as picture:
            return kept[0].axes[0], picture.size

    return draw


def test_the_heatmap_names_models_and_layers_from_the_bottom_left(drawn):
    axes, _ = drawn(table(2, 3), name_a="teacher", name_b="student", title="digits")
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("teacher", "student")
    assert axes.get_title() == "digits"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(table(2, 3).layers_a)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(table(2, 3).layers_b)
    assert axes.yaxis_inverted() is False or axes.get_ylim()[0] < axes.get_ylim()[1]
    assert axes.images[0].get_clim() == (0, 1)
    figures = {text.get_position(): text.get_text() for text in axes.texts}
    assert figures[(2, 1)] == "1.00" and figures[(0, 0)] == "-0.01"


def test_names_are_drawn_as_they_are(drawn):
    axes, _ = drawn(CKATable(torch.eye(2), ("$a^$", "b"), ("a", "b")), name_a="$^$", title="$_$")
    assert axes.get_ylabel() == "$^$"


def test_of_many_layers_some_are_named_and_no_figures_are_written(drawn):
    axes, (width, height) = drawn(table(100, 13))
    assert len(axes.get_yticklabels()) == 34 and len(axes.get_xticklabels()) == 13
    assert not axes.texts
    assert width < height < 2000
