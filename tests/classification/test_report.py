"""The report of a real run, against plain computations on its weights."""

from __future__ import annotations

import json
import re
import shutil
from datetime import datetime

import numpy as np
import pytest
import torch

from classification import report
from classification.config import load_config
from classification.data import load_image_sets, pixel_statistics
from classification.models import create_model, load_classifier
from classification.report_figures import stage_section
from classification.run import run_experiment
from pcka import cli
from pcka.analysis import CKATable
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_config, random_teacher):
    """The folder of a run that wrote its report."""
    folder = tmp_path_factory.mktemp("reported")
    keys = {
        "OUTPUT_DIR": folder / "run", "TEACHER.NAME": "resnet8", "TEACHER.WEIGHTS": random_teacher,
        "DATA.IMAGE_SIZE": 16, "DATA.HOLDOUT": 60, "DATA.TRAIN_IMAGES": 100, "SOLVER.EPOCHS": 3,
        "SOLVER.BATCH_SIZE": 20, "SOLVER.EMA_DECAY": 0.5, "GRADIENTS_EVERY": 1, "DEVICE": "cpu",
        "SOLVER.SCHEDULE": "multistep", "SOLVER.MILESTONES": "[2, 150]",
    }  # fmt: skip
    words = [str(word) for pair in keys.items() for word in pair]
    run_experiment(load_config(digits_config, words, "kd"))
    return folder / "run"


@pytest.fixture(scope="module")
def data(run):
    """The content of its report.json."""
    return json.loads((run / "report.json").read_text())


@pytest.fixture(scope="module")
def cfg(run):
    return load_config(run / "config.yaml")


def logits_of(path, section, images):
    model = load_classifier("resnet8", path, 10, role="student").eval()
    with torch.no_grad():
        return model(pixel_statistics(section)(images.images.float() / 255)).double().numpy()


@pytest.fixture(scope="module")
def logits(run, cfg, random_teacher):
    """Of the evaluation and the training images, by every model."""
    files = {"teacher": random_teacher, "student": run / "model_last.pth"}
    files["averaged student"] = run / "model_ema.pth"
    sections = {name: cfg.TEACHER if name == "teacher" else cfg.STUDENT for name in files}
    train_set, evaluation_set = load_image_sets(cfg)
    return {
        name: tuple(logits_of(path, sections[name], s) for s in (evaluation_set, train_set))
        for name, path in files.items()
    }


@pytest.mark.parametrize("name", ["teacher", "student", "averaged student"])
def test_accuracy_confusion_and_calibration_are_numpys(data, cfg, logits, name):
    found, (own, seen) = data["models"][name], logits[name]
    train_set, evaluation_set = load_image_sets(cfg)
    labels = evaluation_set.labels.numpy()
    predicted = own.argmax(1)
    assert found["top1"] == pytest.approx(100 * (predicted == labels).mean())
    best = np.argsort(-own, axis=1)[:, :5]
    assert found["top5"] == pytest.approx(100 * (best == labels[:, None]).any(1).mean())
    confusion = np.zeros((10, 10), dtype=int)
    np.add.at(confusion, (labels, predicted), 1)
    assert found["confusion"] == confusion.tolist()
    for digit, percent in found["by_class"].items():
        mine = labels == int(digit)
        assert percent == pytest.approx(100 * (predicted[mine] == int(digit)).mean())
    exponents = np.exp(own - own.max(1, keepdims=True))
    confidence = (exponents / exponents.sum(1, keepdims=True)).max(1)
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            right = (predicted == labels)[inside].mean()
            error += inside.mean() * abs(right - confidence[inside].mean())
    assert found["calibration_error"] == pytest.approx(error, abs=1e-5)
    assert sum(b["images"] for b in found["reliability"]) == len(labels)
    trained = 100 * (seen.argmax(1) == train_set.labels.numpy()).mean()
    assert (found["training_top1"], found["training_images"]) == (pytest.approx(trained), 100)


def test_agreement_is_with_the_teacher(data, logits):
    teacher, student = (logits[name][0].argmax(1) for name in ("teacher", "student"))
    expected = pytest.approx(100 * (teacher == student).mean())
    assert data["models"]["student"]["agreement_with_teacher"] == expected
    assert data["models"]["teacher"]["agreement_with_teacher"] is None


def test_it_is_the_last_students_accuracy_that_the_run_states(run, data):
    result = json.loads((run / "result.json").read_text())
    models = data["models"]
    assert models["student"]["top1"] == pytest.approx(result["last_accuracy"])
    assert models["averaged student"]["top1"] == pytest.approx(result["last_accuracy_ema"])
    assert models["teacher"]["top1"] == pytest.approx(result["teacher_accuracy"])
    assert data["metrics"] == read_metrics(run / "metrics.jsonl")


def test_size_and_latency(run, data, random_teacher):
    model = create_model("resnet8", 10)
    student = data["models"]["student"]
    assert student["parameters"] == sum(p.numel() for p in model.parameters())
    assert student["file_bytes"] == (run / "model_last.pth").stat().st_size
    assert data["models"]["teacher"]["file_bytes"] == random_teacher.stat().st_size
    counted = 0

    def count(module, given, out):
        nonlocal counted
        per_output = module.weight[0].numel()
        counted += per_output * out[0].numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, 16, 16))
    assert 1 <= student["macs"] / counted < 1.1  # batch norms beside
    assert student["latency_ms"].keys() == {"1", "64"}
    assert student["latency_ms"]["64"] > student["latency_ms"]["1"] > 0


def test_the_diagonal_of_the_stages_is_what_the_run_followed(data):
    table = np.array(data["cka"]["student"])
    last = data["metrics"][-1]
    assert table.shape == (4, 4)
    followed = [last[f"cka_stage{i}"] for i in range(4)]
    assert table.diagonal() == pytest.approx(followed, abs=1e-4)


def test_the_page_holds_figures_pictures_and_warnings(run, data):
    page = (run / "report.html").read_text()
    for title in (
        "resnet8 taught by resnet8", "Weighted loss terms", "Top-1 accuracy", "Gradients: lengths",
        "Confusion: teacher", "Confusion: averaged student", "Reliability", "CKA: student",
        "Settings that differ from the defaults", "SOLVER.MILESTONES",
    ):  # fmt: skip
        assert title in page
    assert f"{data['models']['student']['top1']:.2f} %" in page
    assert not re.findall(r'src="(?!data:)', page)
    assert any("does not fall at 150" in text for text in data["warnings"])
    assert any("teacher is at chance" in text for text in data["warnings"])
    assert all(text in page.replace("&#39;", "'") for text in data["warnings"])


def test_the_command_gives_the_same_figures_again(run, data, tmp_path, capsys):
    assert cli.main(["report", str(run), "--output", str(tmp_path / "again")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "again" / "report.html")
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    for model in (*data["models"].values(), *again["models"].values()):
        del model["latency_ms"]
    assert again == data


def test_a_baseline_stands_beside_the_student(run, data, tiny_config, tmp_path, cfg):
    same = {"DATA.IMAGE_SIZE": 16, "DATA.HOLDOUT": 60, "DATA.TRAIN_IMAGES": 100}
    result = run_experiment(tiny_config("ce", "ce", **same, **{"TEACHER.NAME": "", "SEED": 5}))
    words = [str(run), "--baseline", str(tmp_path / "ce"), "--output", str(tmp_path / "of")]
    cli.main(["report", *words])
    found = json.loads((tmp_path / "of" / "report.json").read_text())["models"]
    assert found["baseline"]["top1"] == pytest.approx(result["last_accuracy"])
    assert found["student"]["top1"] == data["models"]["student"]["top1"]
    page = (tmp_path / "of" / "report.html").read_text()
    gain = found["student"]["top1"] - result["last_accuracy"]
    assert f"student {gain:+.2f} points" in page and "Confusion: baseline" in page


def test_a_baseline_on_other_images_is_refused(run, tiny_config, tmp_path):
    run_experiment(tiny_config("ce", "ce", **{"TEACHER.NAME": "", "DATA.HOLDOUT": 50}))
    with pytest.raises(ConfigError, match=r"--baseline: .*ce .* DATA\.HOLDOUT is 50 .* 60 here"):
        report.main([str(run), "--baseline", str(tmp_path / "ce")])


def test_a_baseline_of_other_classes_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    (tmp_path / "other" / "classes.txt").write_text("\n".join("abcdefghij") + "\n")
    with pytest.raises(ConfigError, match=r"--baseline: .*other classes \(a, b, .*same ones"):
        report.main([str(run), "--baseline", str(tmp_path / "other")])


def test_stages_that_are_compared_are_named_where_the_models_have_unlike_many():
    def text(own, theirs):
        layers = [tuple(f"stage{i}" for i in range(count)) for count in (own, theirs)]
        return stage_section({"student": CKATable(torch.rand(own, theirs), *layers)}).text

    assert text(4, 4).endswith("stage0 is the stem.")
    assert "has 4 stages and the teacher 5" in text(4, 5)
    assert "the student's stage0 is compared with the teacher's stage1" in text(4, 5)
    assert "the student's stage2 is compared with the teacher's stage0" in text(5, 3)


def test_the_page_tells_when_and_how_long_the_training_was(run, data):
    page = (run / "report.html").read_text()
    seconds = sum(record["seconds"] for record in data["metrics"])
    assert f"3 epochs in 0:00:{round(seconds):02d} (h:mm:ss)" in page
    began = datetime.fromisoformat(json.loads((run / "environment.json").read_text())["date"])
    assert str(began) in page
    assert 0 < (run / "report.html").stat().st_mtime - began.timestamp() < 600


def test_a_run_that_asks_for_none_has_none(tiny_config, tmp_path):
    run_experiment(tiny_config("ce", **{"TEACHER.NAME": "", "REPORT": False}))
    assert (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "run").glob("report.*"))


def test_a_report_that_fails_costs_no_result(tiny_config, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(report, "make_report", fail)
    result = run_experiment(tiny_config("ce", **{"TEACHER.NAME": "", "REPORT": True}))
    assert result["epochs"] == 2
    (told,) = [text for text in caplog.messages if "the report was not written" in text]
    assert f"(OSError: the disk is full); retry with pcka report {tmp_path / 'run'}" in told


def test_a_chance_level_student_whose_loss_falls_is_told_with_the_way_out(run, monkeypatch):
    material = report.Material.of_run(run)
    falling = [{**r, "loss_total": 9.0 - r["epoch"]} for r in material.metrics]
    material = report.Material(material.cfg, material.students, falling)
    monkeypatch.setattr("classification.batch_norm.NEAR_CHANCE", 100.0)
    monkeypatch.setattr(report, "is_guessing", lambda *_: True)
    warnings = report.make_report(material).warnings
    assert any("--recalibrate-bn" in text for text in warnings)
    assert not any(text.startswith("The student is at chance") for text in warnings)  # told once


def test_a_teacher_whose_weights_are_gone_is_left_out_and_told(run, cfg):
    lost = cfg.clone()
    lost.defrost()
    lost.TEACHER.WEIGHTS = str(run / "gone.pth")
    material = report.Material(lost, {"student": run / "model_last.pth"})
    made = report.make_report(material)
    assert made.data["models"].keys() == {"student"} and not made.data["cka"]
    assert f"there is no file {run / 'gone.pth'}" in made.warnings[0]
    assert not [section for section in made.sections if section.title in ("Training", "Stages")]


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"found no config\.yaml; give the OUTPUT_DIR"):
        report.main([str(tmp_path)])
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"found no model_last\.pth"):
        report.main([str(tmp_path)])
