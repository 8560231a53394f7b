from __future__ import annotations

import pytest

from detection import compare, demo
from detection.config import PROJECT
from pcka.engine.command import TrainingFailedError
from pcka.engine.config import ConfigError

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


@pytest.mark.parametrize(("key", "option"), [("SEED", "--seeds"), ("OUTPUT_DIR", "--output")])
def test_pairs_may_not_set_the_seed_or_the_folder(monkeypatch, tmp_path, key, option):
    monkeypatch.setattr(compare.subprocess, "run", None)  # is not called
    with pytest.raises(ConfigError, match=f"{key}: each run has its own; use {option} instead"):
        demo.main(["--output", str(tmp_path), key, "5"])


def test_the_folder_of_the_configurations_can_be_another_one(monkeypatch, tmp_path):
    trained, compared = [], []
    monkeypatch.setattr(demo, "train", lambda file, *_: trained.append(file) or METRICS)

    def one_run(files, *_):
        compared.extend(files)
        return compare.empty_comparison([file.stem for file in files])

    monkeypatch.setattr(demo, "compare", one_run)
    monkeypatch.setattr(demo, "_picture", lambda *_: None)
    demo.main(["--output", str(tmp_path)])
    folder = PROJECT / "configs" / "detection" / "demo"
    assert [*trained, *compared] == [
        folder / f"{name}.yaml"
        for name in ("teacher", "student", "inherited", "pcka", "pcka_mimic")
    ]
    assert all(file.is_file() for file in compared)
    compared.clear()
    demo.main(["--output", str(tmp_path), "--configs", "own", "--methods", "pcka"])
    assert [str(trained[-1]), *map(str, compared)] == ["own/teacher.yaml", "own/pcka.yaml"]
