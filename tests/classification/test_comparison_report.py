"""The report of a comparison, on a real one."""

from __future__ import annotations

import json
import statistics

import pytest

from classification import compare as script
from classification import evaluate
from classification.compare import compare
from classification.comparison_report import _points
from pcka.engine.report_sections import mean_curve
from pcka.engine.run_folder import read_metrics

METHODS, SEEDS = ("ce", "kd"), (0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits_config, random_teacher):
    """The folder of a comparison that wrote its report."""
    folder = tmp_path_factory.mktemp("compared")
    keys = {
        "TEACHER.NAME": "resnet8", "TEACHER.WEIGHTS": random_teacher, "DATA.IMAGE_SIZE": 16,
        "DATA.HOLDOUT": 40, "DATA.TRAIN_IMAGES": 40, "SOLVER.EPOCHS": 2, "SOLVER.BATCH_SIZE": 10,
        "GRADIENTS_EVERY": 1, "DEVICE": "cpu",
    }  # fmt: skip
    words = [str(word) for pair in keys.items() for word in pair]
    compare(digits_config, METHODS, SEEDS, folder, words, costs=False)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    """The content of its report.json."""
    return json.loads((folder / "report.json").read_text())


def test_the_students_of_the_first_seed_stand_beside_the_teacher(folder, data):
    assert list(data["models"]) == ["teacher", *METHODS]
    for method in METHODS:
        result = json.loads((folder / method / "seed0" / "result.json").read_text())
        assert data["models"][method]["top1"] == pytest.approx(result["last_accuracy"])
        last = read_metrics(folder / method / "seed0" / "metrics.jsonl")[-1]
        followed = [last[f"cka_stage{i}"] for i in range(4)]
        table = data["cka"][method]
        assert [table[i][i] for i in range(4)] == pytest.approx(followed, abs=1e-4)


def test_the_table_is_that_of_the_comparison(folder, data):
    page = (folder / "report.html").read_text()
    for row in data["rows"]:
        by_seed = data["results"][row["method"]]
        mean = statistics.fmean(run["last_accuracy"] for run in by_seed.values())
        assert row["last epoch (%)"].startswith(f"{mean:.2f} ± ")
        assert all(cell in page for cell in row.values())
    assert data["rows"][1]["difference"] in ("above", "below", "not shown")
    for title in ("Every run", "mean over seeds", "Gradients of the terms", "Reliability"):
        assert title in page
    assert "Students of seed 0." in page
    assert any(text.startswith("kd: ") for text in data["warnings"])


def test_the_curves_are_means_over_the_seeds(folder):
    runs = [read_metrics(folder / "kd" / f"seed{seed}" / "metrics.jsonl") for seed in SEEDS]
    expected = [(e, statistics.fmean(run[e - 1]["accuracy"] for run in runs)) for e in (1, 2)]
    curves = [_points(run) for run in runs]
    assert mean_curve(curves) == expected
    # A run that was cut short: the epochs that all have.
    assert mean_curve([curves[0], curves[1][:1]]) == expected[:1]


def test_runs_side_by_side_write_no_report_of_their_own(folder):
    assert not list(folder.glob("*/seed*/report.*"))


def test_a_comparison_whose_report_fails_has_its_table(folder, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr("classification.comparison_report.measure", fail)
    kept = {m: {0: {"last_accuracy": 1.0}} for m in METHODS}
    cfg = script.load_config(folder / "ce/seed0/config.yaml")
    comparison = script.new_comparison(dict.fromkeys(METHODS, cfg))
    comparison.results.update(kept)
    script._write_report(comparison, folder)
    assert "the report was not written (RuntimeError: no memory); retry with " in caplog.text


@pytest.mark.parametrize("recalibrated", [False, True])
def test_evaluate_writes_a_report_of_the_weights_it_is_given(folder, data, tmp_path, recalibrated):
    run = folder / "kd" / "seed0"
    weights = tmp_path / "weights.pth"
    weights.write_bytes((run / "model_last.pth").read_bytes())
    words = ["--config-file", str(run / "config.yaml"), "--weights", str(weights)]
    words += ["--recalibrate-bn", "40"] if recalibrated else []
    found = evaluate.main([*words, "--report", str(tmp_path / "report")])
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    student, before = written["models"]["student"], data["models"]["kd"]
    assert found == {"top1": student["top1"], "top5": student["top5"]}
    assert (student["calibration_error"] == before["calibration_error"]) != recalibrated
    assert written["metrics"] == []
    assert written["models"]["teacher"]["top1"] == data["models"]["teacher"]["top1"]


def test_a_report_of_a_teacher_alone_is_refused(folder):
    words = ["--config-file", str(folder / "kd/seed0/config.yaml"), "--role", "teacher"]
    with pytest.raises(evaluate.ConfigError, match="--report: compares a student"):
        evaluate.main([*words, "--report", str(folder)])
