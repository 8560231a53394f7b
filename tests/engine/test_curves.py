from __future__ import annotations

import sys

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from pcka.engine.curves import (
    Panel,
    classifier_panels,
    panel_figure,
    plot_curves,
    plot_gradients,
    plot_panels,
)

METRICS = [
    {
        "epoch": epoch,
        "loss_ce": 2 / epoch,
        "loss_fcka_stage3": 3 / epoch,
        "loss_total": 5 / epoch,
        "train_accuracy": 50.0 + epoch,
        "accuracy": accuracy,
        "seconds": 12.0,
    }
    for epoch, accuracy in ((1, 40.0), (2, 60.5), (3, 60.5), (4, 55.0))
]
METRICS[1]["cka_stage1"] = 0.7
METRICS[3]["cka_stage1"] = 0.8


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw, and give the panels by title."""
    figures = []
    save = Figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def draw(metrics):
        plot_curves(metrics, tmp_path / "curves.png")
        return {axes.get_title(): axes for axes in figures[-1].axes}

    return draw


def lines(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def test_three_panels_of_the_curves(drawn):
    loss, accuracy, alike = drawn(METRICS).values()
    assert lines(loss).keys() == {"ce", "fcka_stage3", "total"}
    assert lines(loss)["total"] == [[1, 5], [2, 2.5], [3, 5 / 3], [4, 1.25]]
    assert lines(accuracy)["evaluation"] == [[1, 40], [2, 60.5], [3, 60.5], [4, 55]]
    assert lines(accuracy)["train"][0] == [1, 51]
    assert lines(alike) == {"stage1": [[2, 0.7], [4, 0.8]]}
    assert {axes.get_xlabel() for axes in (loss, accuracy, alike)} == {"epoch"}


def test_gradients_have_panels_of_their_own(drawn):
    figures = {"gradient_share_ce": 0.9, "gradient_cosine_ce": 1.0, "gradient_cosine_kd": -0.25}
    share, cosine = drawn([{"epoch": 1, **figures}, {"epoch": 2, **figures}]).values()
    assert lines(share) == {"ce": [[1, 0.9], [2, 0.9]]}
    assert lines(cosine)["kd"] == [[1, -0.25], [2, -0.25]]
    assert cosine.get_ylim()[0] < -0.25


def test_the_averaged_student_has_a_curve(drawn):
    (accuracy,) = drawn(
        [{"epoch": e, "accuracy": 10.0, "accuracy_ema": 20.0} for e in (1, 2)]
    ).values()
    assert lines(accuracy)["averaged student"] == [[1, 20], [2, 20]]


def test_the_teachers_accuracy_is_a_line_across(tmp_path):
    panels = {panel.title: panel for panel in classifier_panels(METRICS, 70.25)}
    (axes,) = panel_figure(panels["Top-1 accuracy"], x="epoch").axes
    (line,) = [line for line in axes.get_lines() if line.get_label() == "teacher: 70.25"]
    assert list(line.get_ydata()) == [70.25, 70.25]
    assert axes.get_ylim()[1] > 70.25
    assert not panels["Weighted loss terms"].across
    assert not any(panel.across for panel in classifier_panels(METRICS))


def test_methods_keep_their_colours_where_one_has_no_curve():
    whole, missing = (
        panel_figure(Panel("", "", {"kd": kd, "at": [(1, 2.0), (2, 3.0)]}), x="epoch").axes[0]
        for kd in ([(1, 1.0), (2, 1.0)], [])
    )
    assert missing.get_lines()[0].get_color() == whole.get_lines()[1].get_color()


def test_the_first_best_epoch_is_marked(drawn):
    accuracy = drawn(METRICS)["Top-1 accuracy"]
    assert lines(accuracy)["best: 60.50, epoch 2"] == [[2, 60.5]]


def test_empty_panels_are_left_out(drawn):
    assert list(drawn([{"epoch": 1, "accuracy": 10.0}])) == ["Top-1 accuracy"]
    assert list(drawn([{"epoch": 1, "loss_ce": 1.0}])) == ["Weighted loss terms"]


def test_a_single_figure_is_a_line_across_that_can_be_read_off(drawn):
    (loss,) = drawn([{"epoch": 1, "loss_ce": 1.25}]).values()
    point, across = loss.get_lines()
    assert point.get_label() == "ce: 1.25"
    assert across.get_ydata() == [1.25, 1.25]
    assert point.get_color() == across.get_color()


def test_writes_a_picture_without_global_state(tmp_path):
    path = tmp_path / "curves.png"
    plot_curves(METRICS, path)
    height, width, _ = image.imread(path).shape
    assert width > 2 * height > 400
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_more_than_three_panels_take_further_rows(tmp_path):
    panels = [Panel(f"panel {i}", "CKA", {"stage1": [(0, 0.5), (1, 0.6)]}) for i in range(5)]
    assert plot_panels(panels, tmp_path / "panels.png", x="epoch")
    picture = image.imread(tmp_path / "panels.png")
    assert picture.shape[:2] == (2 * 456, 3 * 600)
    parts = [part for row in np.split(picture, 2) for part in np.split(row, 3, axis=1)]
    assert [bool((part < 1).any()) for part in parts] == [True] * 5 + [False]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="every entry must hold 'epoch'"):
        plot_curves([{"accuracy": 1.0}], tmp_path / "curves.png")
    with pytest.raises(ValueError, match=r"nothing to draw.*\['epoch', 'seconds'\]"):
        plot_curves([{"epoch": 1, "seconds": 2.0}], tmp_path / "curves.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_curves([], tmp_path / "curves.png")


def test_gradients_of_several_runs_stand_side_by_side(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))

    def epoch(number, **of_terms):
        shares = {f"gradient_share_{term}": share for term, (share, _) in of_terms.items()}
        cosines = {f"gradient_cosine_{term}": cosine for term, (_, cosine) in of_terms.items()}
        return {"epoch": number} | shares | cosines

    runs = {
        "kd": [epoch(n, ce=(0.4, 1.0), kd=(0.6, 0.1 * n)) for n in (1, 2)],
        "unmeasured": [{"epoch": 1, "loss_ce": 2.0}],
        "fcka": [epoch(2, ce=(0.9, 1.0), fcka_last=(0.1, -0.2))],
    }
    assert plot_gradients(runs, tmp_path / "gradients.png")
    above, other_above, below, other_below = figures[0].axes
    assert [axes.get_title() for axes in (above, other_above)] == ["kd", "fcka"]
    assert lines(above) == {"ce": [[1, 0.4], [2, 0.4]], "kd": [[1, 0.6], [2, 0.6]]}
    assert lines(below)["kd"] == [[1, 0.1], [2, 0.2]]
    assert "ce" not in lines(below)
    assert lines(other_below)["fcka_last"] == [[2, -0.2]]
    colours = {
        (line.get_label(), line.get_color()) for axes in figures[0].axes for line in axes.lines
    }
    named = [label for label, _ in colours if not label.startswith("_")]
    assert sorted(named) == ["ce", "fcka_last", "kd"]  # a term has one colour in all of them


def test_without_gradients_there_is_no_picture_of_them(tmp_path):
    assert not plot_gradients({"kd": METRICS}, tmp_path / "gradients.png")
    assert not (tmp_path / "gradients.png").exists()
