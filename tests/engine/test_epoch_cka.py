from __future__ import annotations

import csv

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pcka.engine.curves import method_style
from pcka.engine.epoch_cka import EpochCKA


def made(layers: int, epochs: tuple[int, ...] = (0, 2, 3)) -> EpochCKA:
    values = torch.linspace(0, 1, layers * len(epochs), dtype=torch.float64)
    table = values.view(layers, len(epochs))
    names = tuple(f"stage{index}" for index in range(layers))
    return EpochCKA(epochs, names, {"last student": table, "teacher": table / 2})


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """What ``plot`` draws: the axes with a title."""

    def draw(found: EpochCKA):
        kept = []
        save = Figure.savefig
        monkeypatch.setattr(
            Figure, "savefig", lambda f, *a, **k: (kept.append(f), save(f, *a, **k))
        )
        found.plot(tmp_path / "new" / "epochs.png")
        with Image.open(tmp_path / "new" / "epochs.png") as picture:
            assert min(picture.size) > 200
        return {axes.get_title(): axes for axes in kept[0].axes if axes.get_title()}

    return draw


def test_few_layers_are_curves_over_the_epochs_in_the_colours_of_other_pictures(drawn):
    found = made(3)
    axes = drawn(found)
    assert list(axes) == ["CKA with the last student", "CKA with the teacher"]
    for name, panel in zip(found.values, axes.values()):
        lines = {line.get_label(): line for line in panel.get_lines()}
        for index, layer in enumerate(found.layers):
            expected = list(zip(found.epochs, found.values[name][index].tolist()))
            assert lines[layer].get_xydata() == pytest.approx(torch.tensor(expected).numpy())
            assert lines[layer].get_color() == method_style(index)[0]
        assert panel.get_xlabel() == "epoch"


def test_many_layers_are_a_heatmap(drawn):
    found = made(9)
    first, second = drawn(found).values()
    assert first.images[0].get_array().shape == (9, 3)
    assert torch.equal(torch.tensor(second.images[0].get_array().data), found.values["teacher"])
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["0", "2", "3"]
    assert [tick.get_text() for tick in first.get_yticklabels()] == list(found.layers)
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 1)


def test_the_values_are_read_back_from_the_csv(tmp_path):
    found = made(2)
    found.write_csv(tmp_path / "epochs.csv")
    with open(tmp_path / "epochs.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["with", "layer", "0", "2", "3"]
    assert [row[:2] for row in rows] == [
        [name, layer] for name in found.values for layer in found.layers
    ]
    read = torch.tensor([[float(cell) for cell in row[2:]] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(read, torch.cat([*found.values.values()]), atol=1e-6, rtol=0)
