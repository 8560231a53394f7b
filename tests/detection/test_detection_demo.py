from __future__ import annotations

import pytest
import torch

from detection import compare, demo
from detection.config import PROJECT, build_student
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
    (tmp_path / "own").mkdir()
    words = ["--output", str(tmp_path), "--configs", str(tmp_path / "own"), "--methods", "pcka"]
    own = [tmp_path / "own" / name for name in ("teacher.yaml", "pcka.yaml")]
    own[0].touch()
    with pytest.raises(ConfigError, match=r"--configs: there is no .*own/pcka\.yaml; give a"):
        demo.main(words)
    assert trained == [folder / "teacher.yaml"]
    own[1].touch()
    demo.main(words)
    assert [trained[-1], *compared] == own


SEGMENTERS = PROJECT / "configs" / "detection" / "digits_pixels"


@pytest.fixture
def finished(small_config):
    """``finished(folder, *overrides)``: leave an untrained segmenter where a run would."""

    def make(folder, *more):
        cfg = small_config("../digits_pixels/student", *more)
        torch.manual_seed(0)
        student = build_student(cfg).eval()
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(cfg.dump())
        torch.save({"model": student.state_dict()}, folder / "model_final.pth")
        return student

    return make


def test_segmenters_are_told_by_their_pixels(monkeypatch, tmp_path, capsys, finished):
    metrics = {"sem_seg": {"mIoU": 40.0, "mACC": 50.0, "pACC": 90.0}}
    comparison = compare.empty_comparison(["student"])
    compare.add(comparison, "student", 0, metrics)
    for name in ("teacher", "student/seed0"):
        finished(tmp_path / "steps200" / name)
    monkeypatch.setattr(demo, "train", lambda *_: metrics)
    monkeypatch.setattr(demo, "compare", lambda *_: comparison)
    words = ["--configs", str(SEGMENTERS), "--methods", "student", "--output", str(tmp_path)]
    demo.main(words)
    assert (tmp_path / "steps200" / "detections-0.png").stat().st_size > 5000
    assert "teacher: mIoU 40.00\n" in capsys.readouterr().out


def test_each_model_sees_the_images_in_its_own_channel_order(monkeypatch, tmp_path, finished):
    teacher = finished(tmp_path / "teacher", "INPUT.FORMAT", "BGR")
    student = finished(tmp_path / "student", "INPUT.FORMAT", "RGB")
    shown = []
    monkeypatch.setattr(demo, "draw_found", lambda cfg, models, _: shown.append((cfg, models)))
    demo._picture({name: tmp_path / name for name in ("teacher", "student")}, tmp_path / "p.png")
    ((cfg, models),) = shown
    assert cfg.INPUT.FORMAT == "RGB"
    image = torch.randint(256, (3, 128, 128), dtype=torch.uint8)

    def scores(model, pixels):
        with torch.no_grad():
            (found,) = model.eval()([{"image": pixels, "height": 128, "width": 128}])
        return found["sem_seg"]

    torch.testing.assert_close(scores(models["teacher"], image), scores(teacher, image.flip(0)))
    torch.testing.assert_close(scores(models["student"], image), scores(student, image))
