"""The doctor on a set-up that is well, and on those with one thing wrong each."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from classification import doctor
from classification.config import load_config
from classification.doctor import Examination
from classification.evaluation import is_guessing
from classification.models import create_model
from pcka import cli
from pcka.engine.doctor import FAIL, PASS, SKIP, WARN, examine

COLOURS = ("blue", "dark", "green", "red")  # the classes, in the order of their labels
CHANNELS = {"red": 0, "green": 1, "blue": 2}
PER_CLASS = {"train": 4, "test": 20}

# A teacher whose answers depend on the channels' order and on where 0 lies.
MODEL = """
from torch import nn


class Painted(nn.Module):
    stage_names = ("stem", "body")
    classifier_name = "head"

    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 3, 1, bias=False), nn.AvgPool2d(4)
        self.head = nn.Linear(3, num_classes)

    def forward(self, images):
        return self.head(self.body(self.stem(images)).mean((2, 3)))
"""

CONFIG = """
OUTPUT_DIR: {folder}/run
DEVICE: cpu
DATA: {{NAME: folder, ROOT: {folder}/images, IMAGE_SIZE: 8, CROP_PADDING: 1}}
STUDENT: {{NAME: resnet8, PIXEL_MEAN: [0.3, 0.3, 0.3], PIXEL_STD: [0.3, 0.3, 0.3]}}
TEACHER:
  NAME: painted_for_doctor:Painted
  WEIGHTS: {folder}/teacher.pth
  PIXEL_MEAN: [0.5, 0.5, 0.5]
  PIXEL_STD: [0.5, 0.5, 0.5]
SOLVER: {{EPOCHS: 2, BATCH_SIZE: 8, MILESTONES: [1]}}
DISTILL: {{METHODS: [CE, KD]}}
"""


def teacher_weights(*, swapped: bool = False) -> dict[str, torch.Tensor]:
    """Of a teacher that is always right: a colour's logit is its channel, that of dark is 0."""
    head = torch.zeros(len(COLOURS), 3)
    for label, colour in enumerate(COLOURS):
        if colour in CHANNELS:
            head[label, CHANNELS[colour]] = 4.0
    stem = torch.eye(3).flip(0) if swapped else torch.eye(3)
    bias = torch.zeros(len(COLOURS))
    return {"stem.weight": stem[:, :, None, None], "head.weight": head, "head.bias": bias}


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """A folder with images, a teacher and ``config.yaml``; all is well."""
    generator = np.random.RandomState(0)
    for split, count in PER_CLASS.items():
        for colour in COLOURS:
            folder = tmp_path / "images" / split / colour
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.randint(10, 60, (8, 8, 3))
                if colour in CHANNELS:
                    pixels[..., CHANNELS[colour]] += 170
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "painted_for_doctor.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path / "code")
    torch.save(teacher_weights(), tmp_path / "teacher.pth")
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def findings_of(folder: Path, *overrides: object) -> dict[str, tuple[str, str]]:
    file, words = folder / "config.yaml", [str(word) for word in overrides]
    examination = Examination(lambda: load_config(file, words))
    return {what: (status, text) for what, status, text in examine(examination.checks())}


def test_a_set_up_that_is_well_passes_every_check_and_leaves_nothing_behind(setup):
    before = sorted(setup.rglob("*"))
    found = findings_of(setup, "TEACHER.ACCURACY", 100)
    assert {what: status for what, (status, _) in found.items()} == dict.fromkeys(found, PASS)
    assert [path for path in sorted(setup.rglob("*")) if "__pycache__" not in str(path)] == before
    texts = {what: text for what, (_, text) in found.items()}
    assert "16 images to train on, 80 to evaluate on, of 4 classes" in texts["data"]
    assert "reaches 100.00 % on 80 evaluation images, 100.00 % is stated" in texts["teacher"]
    assert texts["a step"].startswith("ce ") and ", kd " in texts["a step"]
    assert "a step" in texts["cost"] and "the run" in texts["cost"]


def test_a_tap_behind_an_activation_in_one_model_alone_is_told(setup):
    # The teacher's body has no activation; the student's stage ends with a ReLU.
    status, text = findings_of(setup, "DISTILL.METHODS", "[CE, FCKA]")["models and taps"]
    assert status == PASS
    assert text.endswith("taps: last; last: below zero in the teacher only")


def bgr(folder: Path) -> None:
    torch.save(teacher_weights(swapped=True), folder / "teacher.pth")


def untrained(folder: Path) -> None:
    weights = teacher_weights()
    weights["head.weight"] = weights["head.weight"].roll(1, 0)
    torch.save(weights, folder / "teacher.pth")


def another_model(folder: Path) -> None:
    torch.save(create_model("resnet8", 4).state_dict(), folder / "teacher.pth")


def damaged_image(folder: Path) -> None:
    (folder / "images" / "train" / "red" / "1.png").write_bytes(b"no image")


def same_images(folder: Path) -> None:
    for path in (folder / "images" / "train").rglob("*.png"):
        Image.new("RGB", (8, 8), (9, 9, 9)).save(path)


def broken_student(folder: Path) -> None:
    weights = create_model("resnet8", 4).state_dict()
    weights["fc.bias"][0] = torch.nan
    torch.save(weights, folder / "student.pth")


def nothing(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("break_it", "overrides", "what", "status", "message"),
    [
        (nothing, ("SOLVER.EPOCH", 3), "configuration", FAIL, r"SOLVER\.EPOCH\b.*SOLVER.EPOCHS"),
        (nothing, ("STUDENT.NAME", "resnet9"), "models and taps", FAIL, "STUDENT.NAME: .*resnet8"),
        (
            nothing,
            ("DISTILL.TAPS", "[[x, layer9, stem]]", "DISTILL.METHODS", "[CE, FCKA]"),
            *("models and taps", FAIL, "DISTILL.TAPS: student: .*no module 'layer9'"),
        ),
        (nothing, ("TEACHER.WEIGHTS", "no.pth"), "models and taps", FAIL, "there is no file"),
        (nothing, ("DATA.ROOT", "nowhere"), "data", FAIL, "DATA.ROOT: expected the folder nowhere"),
        (damaged_image, (), "data", FAIL, r"cannot decode the image .*red/1\.png"),
        (same_images, (), "data", FAIL, "all look the same: check DATA.ROOT"),
        (
            nothing,
            ("STUDENT.PIXEL_STD", "[0.001, 0.001, 0.001]"),
            *("student's pixels", WARN, r"deviation .*these images have \[0\.\d+, "),
        ),
        (another_model, (), "teacher", FAIL, r"TEACHER\.WEIGHTS: .*does not fit Painted"),
        (bgr, ("TEACHER.ACCURACY", 95), "teacher", FAIL, r"50\.00 %.* states 95\.00 %"),
        (untrained, (), "teacher", FAIL, "at chance level: it is untrained"),
        (bgr, (), "teacher's pixels", FAIL, r"channels: 100\.00 %.*50\.00 % as .*trained on BGR"),
        (
            nothing,
            ("TEACHER.PIXEL_MEAN", "[0, 0, 0]", "TEACHER.PIXEL_STD", "[1, 1, 1]"),
            *("teacher's pixels", FAIL, r"statistics: 100\.00 % with .*75\.00 %.*PIXEL_MEAN \[0\."),
        ),
        (nothing, ("SOLVER.BATCH_SIZE", 64), "a step", FAIL, "SOLVER.BATCH_SIZE: 64 is more than"),
        (broken_student, ("STUDENT.WEIGHTS", "{}/student.pth"), "a step", FAIL, "finite"),
        (nothing, ("SOLVER.MILESTONES", "[9]"), "a step", WARN, "rate does not fall at 9"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(setup, break_it, overrides, what, status, message):
    break_it(setup)
    found = findings_of(setup, *(str(word).replace("{}", str(setup)) for word in overrides))
    assert found[what][0] == status, found
    assert re.search(message, found[what][1]), found[what]
    # Whatever comes before it is well.
    for other, (other_status, _) in found.items():
        if other == what:
            break
        assert other_status == PASS, found


def test_a_disk_too_small_is_named(setup, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 30, 1000))
    status, text = findings_of(setup)["disk"]
    assert status == FAIL and "make room, or choose another OUTPUT_DIR" in text


def test_the_students_that_a_run_keeps_count_for_the_disk(setup, monkeypatch):
    words = ["SOLVER.EPOCHS", "3"]
    examination = Examination(lambda: load_config(setup / "config.yaml", words))
    examine(examination.checks())
    monkeypatch.setattr(doctor, "check_disk", lambda _, needed: needed)
    needed = []
    for every in (0, 1, 2):
        examination._cfg = examination.cfg.clone()
        examination.cfg.defrost()
        examination.cfg.KEEP_EVERY = every
        needed.append(examination.check_room())
    student = sum(t.nbytes for t in create_model("resnet8", 4).state_dict().values())
    assert needed[1] - needed[0] == 4 * student  # epochs 0, 1, 2, 3
    assert needed[2] - needed[0] == 3 * student  # 0, 2, 3


def test_a_folder_that_holds_a_run_is_named(setup):
    (setup / "run").mkdir()
    (setup / "run" / "checkpoint.pth").touch()
    status, text = findings_of(setup)["configuration"]
    assert status == WARN and "holds a run; continue it with --resume" in text


def test_a_teacher_that_is_to_be_trained_is_not_trained_for_a_look(setup, caplog):
    cache = setup / "teachers"
    found = findings_of(
        setup, "TEACHER.WEIGHTS", "", "TEACHER.TRAIN", True, "TEACHER.CACHE_DIR", cache
    )
    first = "painted_for_doctor:Painted (240 epochs)"
    assert found["teacher"] == (WARN, f"trained first: {first}; accuracy unknown")
    assert found["teacher's pixels"][0] == SKIP and found["a step"][0] == PASS
    assert not cache.exists()
    assert "is at chance" not in caplog.text  # of the one that stands in for it


@pytest.mark.parametrize("train", [False, True])
def test_a_look_keeps_no_outputs_of_the_teacher(setup, train):
    words = ["TEACHER.WEIGHTS", "", "TEACHER.TRAIN", True] if train else []
    found = findings_of(setup, *words, "TEACHER.OUTPUTS", setup / "outputs")
    assert found["cost"][0] == PASS
    assert not (setup / "outputs").exists()


def test_outputs_that_a_run_would_refuse_are_named(setup):
    words = ["TEACHER.OUTPUTS", setup / "outputs"]
    too_large = findings_of(setup, *words, "TEACHER.OUTPUTS_GB", 1e-7)["a step"]
    assert too_large[0] == FAIL and "TEACHER.OUTPUTS_GB: the teacher's outputs take" in too_large[1]
    (setup / "outputs").mkdir()
    (setup / "outputs" / "manifest.json").write_text("{}")
    status, text = findings_of(setup, *words)["teacher"]
    assert status == FAIL and "outputs' was made with TEACHER.NAME ''" in text


def test_each_of_several_teachers_is_looked_at(setup):
    torch.save(create_model("resnet8", 4).state_dict(), setup / "other.pth")
    joint = f"[{{NAME: resnet8, WEIGHTS: {setup / 'other.pth'}}}]"
    found = findings_of(setup, "TEACHER.OTHERS", joint)
    assert found["teacher"][1].startswith("painted_for_doctor:Painted + resnet8 reaches ")
    assert found["a step"][0] == PASS


def test_those_of_several_teachers_that_are_to_be_trained_are_named(setup):
    cache = ["TEACHER.CACHE_DIR", setup / "teachers"]
    others = "[{NAME: resnet14, TRAIN: true}, {NAME: resnet20, TRAIN: true, EPOCHS: 7}]"
    found = findings_of(setup, *cache, "TEACHER.OTHERS", others)
    first = "resnet14 (240 epochs), resnet20 (7 epochs)"
    assert found["teacher"] == (WARN, f"trained first: {first}; accuracy unknown")
    assert found["a step"][0] == PASS and not cache[1].exists()


def test_what_needs_something_that_failed_is_not_looked_at(setup):
    found = findings_of(setup, "DATA.ROOT", "nowhere")
    assert found["a step"] == (SKIP, "skipped: needs the data")
    assert found["disk"] == (SKIP, "skipped: needs the step")


def test_a_student_without_teacher(setup):
    found = findings_of(setup, "TEACHER.NAME", "", "DISTILL.METHODS", "[CE]")
    assert {status for status, _ in found.values()} == {PASS, SKIP}
    assert found["teacher's pixels"] == (SKIP, "skipped: no teacher")


@pytest.mark.parametrize(("root", "status"), [("images", None), ("nowhere", 1)])
def test_the_command_prints_a_screen_and_ends_with_its_status(
    setup, monkeypatch, capsys, root, status
):
    monkeypatch.setattr(doctor, "machine_checks", list)
    words = ["doctor", "--config-file", setup / "config.yaml", "DATA.ROOT", setup / root]
    try:
        cli.main([str(word) for word in words])
        ended = None
    except SystemExit as end:
        ended = end.code
    assert ended == status
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert lines[-1].endswith(f"{int(status or 0)} of 9 checks failed, 0 warned")


def pair(folder: Path, *more: object) -> list[str]:
    models = ["--teacher", "painted_for_doctor:Painted", "--student", "resnet8"]
    weights = ["--weights", folder / "teacher.pth", "OUTPUT_DIR", folder / "run", "DEVICE", "cpu"]
    return [str(word) for word in ("doctor", "--data", folder / "images", *models, *weights, *more)]


def test_a_folder_and_two_names_are_looked_at_as_they_would_be_trained(setup, monkeypatch):
    monkeypatch.setattr(doctor, "machine_checks", list)
    before = sorted(path for path in setup.rglob("*") if "__pycache__" not in str(path))
    found = {what: (status, text) for what, status, text in cli.main(pair(setup))}
    after = sorted(path for path in setup.rglob("*") if "__pycache__" not in str(path))
    assert after == before
    assert {status for status, _ in found.values()} <= {PASS, WARN}
    assert found["configuration"] == (PASS, f"CE, KD, FCKA into {setup / 'run'}")
    told = found["proposal"][1]
    assert "; data: 16 images of 4 classes; " in told
    assert "training: SOLVER.EPOCHS 100" in told and "method: kd_fcka" in told
    assert "reaches 100.00 % on 80 evaluation images" in found["teacher"][1]
    assert ", fcka_" in found["a step"][1]


@pytest.mark.parametrize(
    ("words", "what", "message"),
    [
        (["doctor", "--data", "{}/images"], "configuration", "--student: expected --config-file"),
        (["doctor", "--data", "{}/no", "--student", "resnet8"], "configuration", "no"),
        (["doctor", "--weights", "F"], "configuration", "--data and --student: expected"),
    ],
)
def test_a_pair_that_is_not_whole_is_told(setup, monkeypatch, capsys, words, what, message):
    monkeypatch.setattr(doctor, "machine_checks", list)
    with pytest.raises(SystemExit):
        cli.main([word.replace("{}", str(setup)) for word in words])
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"FAIL {what} .*{message}", text), text


@pytest.mark.parametrize(
    ("top1", "classes", "images", "expected"),
    [(1.0, 100, 1000, True), (9.0, 100, 1000, False), (50.0, 2, 100, True), (80.0, 2, 100, False)],
)
def test_what_counts_as_guessing(top1, classes, images, expected):
    assert is_guessing(top1, classes, images) == expected
