"""The report of a detector's run, on a real one."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from matplotlib.figure import Figure

from detection import grams, report, train_net
from detection.checkpoint import load_weights
from detection.config import build_student, load_config, teacher_config
from detection.figures import read_metrics
from pcka.engine.config import ConfigError


@pytest.fixture(scope="module")
def run(taught_run):
    """The folder of a run that wrote its report, from a teacher in a file."""
    return taught_run


@pytest.fixture(scope="module")
def data(run):
    """The content of its report.json."""
    return json.loads((run / "report.json").read_text())


def test_the_metrics_and_the_alignment_are_the_runs(run, data):
    result = json.loads((run / "result.json").read_text())
    assert data["metrics"] == {"student": result}
    curves = read_metrics(run / "metrics.json")
    assert set(data["cka"]) == {"p3", "p4", "p5"}
    for level, value in data["cka"].items():
        assert value == curves[f"cka/{level}"][-1][1]
    losses = [key for key in data["curves"] if "loss" in key]
    assert "loss_pcka_p3_rows" in losses


def test_the_cost_of_both_detectors(run, data):
    cfg = load_config(str(run / "config.yaml"), [])
    for name, config in (("teacher", teacher_config(cfg)), ("student", cfg)):
        model, found = build_student(config), data["cost"][name]
        assert found["parameters"] == sum(p.numel() for p in model.parameters())
        assert found["latency_ms"] > 0
        # More than the backbone's first convolution, 7 x 7 on every second pixel of 128 x 128.
        assert found["macs"] > 49 * 3 * model.backbone.bottom_up.stem.conv1.out_channels * 64**2
    assert data["cost"]["teacher"]["macs"] > data["cost"]["student"]["macs"]
    assert data["cost"]["student"]["file_bytes"] == (run / "model_final.pth").stat().st_size


def test_the_page_holds_pictures_and_warnings(run, data):
    page = (run / "report.html").read_text()
    for title in ("RetinaNet on", "Weighted loss terms", "AP by class", "Hits and misses", "Cost"):
        assert title in page
    assert "Grams of the levels" in page and "There are none" not in page
    assert not re.findall(r'src="(?!data:)', page)
    assert page.count("data:image/png") == 2  # photographs, of which the Grams have one
    assert any("does not fall at 9" in text for text in data["warnings"])
    assert any("finds next to nothing" in text for text in data["warnings"])


def test_the_command_evaluates_the_teacher_where_it_is_asked_to(run, data, tmp_path, capsys):
    report.main([str(run), "--output", str(tmp_path), "--teacher", "--images", "1"])
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "report.html"))
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["metrics"]["student"] == data["metrics"]["student"]
    assert again["metrics"]["teacher"]["bbox"].keys() == again["metrics"]["student"]["bbox"].keys()
    assert (again["cka"], again["config"]) == (data["cka"], data["config"])


def test_a_baseline_stands_beside_the_student(run, data, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.yaml", "model_final.pth"):
        shutil.copy(run / name, other)
    (other / "result.json").write_text(json.dumps({"bbox": {"AP": 12.5, "AP50": 20.0}}))
    made = report.make_report(run, baseline=other, images=1)
    assert made.data["metrics"] == {
        "baseline": {"bbox": {"AP": 12.5, "AP50": 20.0}}, **data["metrics"]
    }  # fmt: skip
    (table,) = made.sections[0].tables
    assert [row[0] for row in table.rows] == ["baseline", "student"]
    assert table.rows[0][1] == "12.50"
    assert made.cards[0].note == "baseline 12.50"
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(
        text.replace("- digits_scenes_test", "- digits_scenes_train")
    )
    told = r"--baseline: .*other was .*DATASETS\.TEST is .*s_train.* here"
    with pytest.raises(ConfigError, match=told):
        report.make_report(run, baseline=other)
    (other / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"other: expected .* found no result\.json"):
        report.make_report(run, baseline=other)


def test_the_page_says_with_what_it_was_trained(run, data):
    saved = json.loads((run / "environment.json").read_text())
    assert data["environment"] == saved
    assert saved["date"] in (run / "report.html").read_text()


def test_a_teacher_whose_file_is_gone_is_left_out_and_told(run):
    weights = run.parent / "teacher.pth"
    weights.rename(run.parent / "moved.pth")
    try:
        made = report.make_report(run, images=1)
    finally:
        (run.parent / "moved.pth").rename(weights)
    assert made.data["cost"].keys() == {"student"}
    assert made.warnings[0] == f"The teacher is left out: there is no file {str(weights)!r}"


def test_a_teacher_sees_the_students_images_in_its_own_channel_order(run, tmp_path, monkeypatch):
    cfg = load_config(str(run / "config.yaml"), [])
    cfg.INPUT.FORMAT = "RGB"  # the teacher's is BGR
    cfg.DISTILL.TEACHER.OPTS += ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
    for name in ("result.json", "model_final.pth"):
        shutil.copy(run / name, tmp_path)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    evaluated, pictured = [], []

    def found_figure(_, models, images):
        pictured.append(models["teacher"])
        return Figure()

    monkeypatch.setattr(report, "found_figure", found_figure)
    monkeypatch.setattr(report, "evaluate", lambda _, model: evaluated.append(model) or {})
    report.make_report(tmp_path, with_teacher=True)
    teacher = build_student(teacher_config(cfg)).eval()
    load_weights(teacher, cfg.DISTILL.TEACHER.WEIGHTS)
    image = torch.randint(256, (3, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        (expected,) = teacher([{"image": image.flip(0)}])
        for model in (*evaluated, *pictured):
            (found,) = model.eval()([{"image": image}])
            torch.testing.assert_close(found["instances"].scores, expected["instances"].scores)
    assert len(evaluated) == len(pictured) == 1 and len(expected["instances"]) > 10


def test_every_one_of_several_test_sets_is_reported(run, tmp_path):
    cfg = load_config(str(run / "config.yaml"), [])
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = ("digits_scenes_test", "digits_scenes_train"), str(tmp_path)
    shutil.copy(run / "model_final.pth", tmp_path)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    results = {name: {"bbox": {"AP": n, "AP-0": n}} for n, name in enumerate(cfg.DATASETS.TEST)}
    (tmp_path / "result.json").write_text(json.dumps(results))
    made = report.make_report(tmp_path, with_teacher=True, images=1)
    tasks = [f"bbox ({name})" for name in cfg.DATASETS.TEST]
    assert [list(of_one) for of_one in made.data["metrics"].values()] == [tasks, tasks]
    assert [table.headings[0] for table in made.sections[0].tables] == tasks
    assert [card.label for card in made.cards[:2]] == [f"{task} AP" for task in tasks]
    titles = [section.title for section in made.sections]
    assert all(f"Classes ({task})" in titles for task in tasks)


def test_a_run_without_a_test_set_is_refused_in_words(run, tmp_path):
    cfg = load_config(str(run / "config.yaml"), ["DATASETS.TEST", "()"])
    shutil.copy(run / "model_final.pth", tmp_path)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    (tmp_path / "result.json").write_text("{}")
    for command in (report.main, grams.main):
        with pytest.raises(ConfigError, match=r"DATASETS\.TEST: expected a set of images to"):
            command([str(tmp_path)])


def test_a_number_of_images_below_one_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        report.main([str(run), "--images", "0"])
    assert "argument --images: expected at least 1, got 0" in capsys.readouterr().err


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"finished detector, found no config\.yaml"):
        report.main([str(tmp_path)])


def test_a_segmenter_is_reported_by_its_pixels(tmp_path, arguments):
    words = arguments(tmp_path / "run", 2, config="../digits_pixels/student")
    results = train_net.main([*words, "REPORT", "True"])["sem_seg"]
    page = (tmp_path / "run" / "report.html").read_text()
    for title in ("SemanticSegmentor on", "IoU by class", "The class of each pixel", "Cost"):
        assert title in page
    assert page.count("data:image/png") == 1
    data = json.loads((tmp_path / "run" / "report.json").read_text())
    assert data["metrics"]["student"]["sem_seg"]["mIoU"] == pytest.approx(results["mIoU"])
    (_, classes, figures) = next(report.class_figures(data["metrics"]))
    assert len(classes) == 11
    assert figures["student"][0] == pytest.approx(results[f"IoU-{classes[0]}"])
