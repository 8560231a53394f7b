from __future__ import annotations

import io

import numpy as np
import pytest

from pcka.analysis.predictions import Bin
from pcka.engine.report_pictures import class_figure, confusion_figure, reliability_figure

STYLES = {"teacher": ("#666666", "--"), "student": ("#0072B2", "-")}


def test_a_confusion_shows_shares_of_rows():
    figure = confusion_figure(np.array([[3, 1], [0, 0]]), ["cat", "dog"])
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.get_images()[0].get_array(), [[75, 25], [0, 0]])
    assert {text.get_text() for text in axes.texts} == {"75", "25"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "label")


def test_many_classes_are_neither_named_nor_written_into_cells():
    axes = confusion_figure(np.eye(100), [f"class{i}" for i in range(100)]).axes[0]
    assert not axes.texts
    assert not any("class" in label.get_text() for label in axes.get_xticklabels())


def test_reliability_of_no_images_is_an_empty_figure():
    empty = {"student": [Bin(0.0, 1.0, 0, 0.0, 0.0)]}
    assert reliability_figure(empty, STYLES).axes


def test_reliability_leaves_empty_intervals_out():
    bins = [Bin(0.0, 0.5, 0, 0.0, 0.0), Bin(0.5, 1.0, 8, 0.9, 0.75)]
    above, below = reliability_figure({"student": bins}, STYLES).axes
    line = next(line for line in above.get_lines() if line.get_label() == "student")
    assert line.get_xydata().tolist() == [[0.9, 0.75]]
    assert line.get_color() == "#0072B2"
    assert below.patches[0].get_data().values.tolist() == [0, 100]


@pytest.mark.parametrize("classes", [3, 60])
def test_classes_are_sorted_by_the_last_models_figure(classes):
    names = [f"class{i}" for i in range(classes)]
    student = [float(10 + (7 * i) % classes) for i in range(classes)]
    student[1] = None
    axes = class_figure({"teacher": [90.0] * classes, "student": student}, names, STYLES).axes[0]
    points = next(line for line in axes.get_lines() if line.get_label() == "student")
    values = points.get_xdata().tolist()
    assert values == sorted(v for v in student if v is not None)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    figures = {"teacher": [None] * classes, "student": student}
    assert class_figure(figures, names, STYLES).axes  # of whom nothing is known
    assert (labels[0] == "class1") == (classes == 3)  # without a figure: below; many have no names


def test_names_are_drawn_as_they_are():
    names, figures = ["$5-$10", "$5^$"], {"student": [50.0, 60.0]}
    for figure in (class_figure(figures, names, STYLES), confusion_figure(np.eye(2), names)):
        labels = figure.axes[0].get_yticklabels()
        assert {label.get_text() for label in labels} == set(names)
        assert not any(label.get_parse_math() for label in labels)
        figure.savefig(io.BytesIO())  # "$5^$" is no formula
