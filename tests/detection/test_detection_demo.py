from __future__ import annotations

from detection import compare, demo
from pcka.engine.command import TrainingFailedError

METRICS = {"bbox": {"AP": 20.0, "AP50": 40.0, "AP75": 10.0}}


def test_runs_that_failed_are_listed_and_left_out_of_the_pictures(monkeypatch, tmp_path, capsys):
    comparison = compare.empty_comparison(["student", "pcka"])
    compare.add(comparison, "student", 0, METRICS)
    comparison.add("pcka", 0, TrainingFailedError("out of memory"))
    pictures = []
    monkeypatch.setattr(demo, "train", lambda *_: METRICS)
    monkeypatch.setattr(demo, "compare", lambda *_: comparison)
    monkeypatch.setattr(demo, "_picture", lambda folders, path: pictures.append(list(folders)))
    demo.main(["--output", str(tmp_path)])
    assert pictures == [["teacher", "student"]]
    assert "pcka, seed 0: out of memory" in capsys.readouterr().out
