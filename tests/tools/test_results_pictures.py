from __future__ import annotations

import pytest

from pcka.engine.config import ConfigError
from tools import results_pictures
from tools.results_pictures import LABELS, SHOWN, accuracies, gradients, main

ROWS = [
    {"method": method, "seed": str(seed), "last_accuracy": str(value)}
    for method, values in {"ce": (60.0, 62.0), "kd": (65.0, 67.5), "own": (40.0, 41.0)}.items()
    for seed, value in enumerate(values)
]


def test_the_docs_pictures_are_drawn_from_their_figures():
    main(["--check"])


def test_a_bar_ends_at_the_mean_and_each_seed_has_a_dot():
    (axes,) = accuracies(ROWS).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["own", LABELS["ce"], "KD"]
    assert [bar.get_width() for bar in axes.patches] == [40.5, 61.0, 66.25]
    assert [list(line.get_xdata()) for line in axes.lines] == [[40, 41], [60, 62], [65, 67.5]]


def test_gradients_are_those_of_the_figures():
    rows = [
        {"method": SHOWN[1], "epoch": str(epoch), "term": term, "share": share, "cosine": "0.5"}
        for epoch in (1, 2)
        for term, share in (("ce", "0.25"), ("kd", "0.75"))
    ]
    above, below = gradients(rows).axes
    assert above.get_title() == SHOWN[1]
    assert {line.get_label(): list(line.get_ydata()) for line in above.lines} == {
        "ce": [0.25, 0.25],
        "kd": [0.75, 0.75],
    }
    assert list(below.lines[0].get_ydata()) == [0.5, 0.5]
    with pytest.raises(ConfigError, match="expected gradients of"):
        gradients([{"method": "another"}])


def test_a_picture_of_other_figures_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(results_pictures, "ROOT", tmp_path)
    monkeypatch.setattr(results_pictures, "PICTURES", {"a.svg": ("a.csv", accuracies)})
    figures = tmp_path / "benchmarks" / "results" / "a.csv"
    figures.parent.mkdir(parents=True)
    figures.write_text("method,seed,last_accuracy\nce,0,60.0\n")
    main([])
    drawn = (tmp_path / "docs" / "pictures" / "a.svg").read_text()
    main(["--check"])
    figures.write_text("method,seed,last_accuracy\nce,0,61.0\n")
    with pytest.raises(ConfigError, match=r"a\.svg: its figures have changed"):
        main(["--check"])
    main([])
    assert (tmp_path / "docs" / "pictures" / "a.svg").read_text() != drawn
