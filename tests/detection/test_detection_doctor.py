"""The doctor on a detector's set-up that is well, and on those with one thing wrong each."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from detection import doctor
from detection.config import PROJECT, build_student, load_config
from detection.data import register_datasets
from detection.data.mapper import make_mapper
from detection.data.pixels import Labels
from detection.data.targets import training_set
from detection.examination import Examination
from detection.pixel_checks import check_student, check_teacher_pixels
from detection.teacher import TeacherDetector, build_teacher
from detection.teacher_checks import read_truth
from pcka import cli
from pcka.engine.doctor import FAIL, PASS, SKIP, WARN, examine
from pcka.losses import numerics

DIGITS = PROJECT / "configs" / "detection" / "digits"
SIDE, IMAGES = 128, {"train": 10, "test": 4}
COLOURS = {"red": (200, 0, 0), "blue": (0, 0, 200), "white": (255, 255, 255)}  # RGB
NAMES = {"train": "painted_train", "test": "painted_test"}
TEACHER = f"""
_BASE_: {DIGITS}/base.yaml
INPUT: {{FORMAT: BGR}}
MODEL:
  META_ARCHITECTURE: PaintedDetector
  PIXEL_MEAN: [127.5, 127.5, 127.5]
  PIXEL_STD: [64.0, 64.0, 64.0]
  RESNETS: {{RES2_OUT_CHANNELS: 16, WIDTH_PER_GROUP: 4}}
  FPN: {{OUT_CHANNELS: 32}}
  ROI_HEADS: {{NUM_CLASSES: 3}}
"""


@META_ARCH_REGISTRY.register()
class PaintedDetector(nn.Module):
    """Sees a square of each colour by its channels, BGR, that are bright."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(cfg.MODEL[name.upper()]).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.bright = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        (given,) = batch
        blue, _, red = (given["image"] - self.pixel_mean) / self.pixel_std > self.bright
        boxes, classes = [], []
        for label, mask in enumerate((red & ~blue, blue & ~red, red & blue)):
            rows, columns = mask.nonzero().unbind(1)
            if len(rows):
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                classes.append(label)
        found = Instances((given["height"], given["width"]))
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
        found.pred_classes = torch.tensor(classes, dtype=torch.int64)
        found.scores = torch.ones(len(classes))
        return [{"instances": found}]


def paint(folder: Path, split: str) -> None:
    """Images with a square of each colour, and their boxes in COCO's format."""
    noise = np.random.RandomState(len(split))
    images, boxes = [], []
    for number in range(IMAGES[split]):
        pixels = noise.randint(10, 60, (SIDE, SIDE, 3))
        for label, colour in enumerate(COLOURS.values()):
            x, y, side = 8 + 40 * label, noise.randint(8, 80), noise.randint(20, 36)
            pixels[y : y + side, x : x + side] = np.maximum(
                pixels[y : y + side, x : x + side], colour
            )
            boxes.append(
                {"id": len(boxes) + 1, "image_id": number + 1, "category_id": label + 1,
                 "bbox": [x, y, int(side), int(side)], "area": int(side**2), "iscrowd": 0}
            )  # fmt: skip
        name = f"{split}{number}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name)
        images.append({"id": number + 1, "file_name": name, "width": SIDE, "height": SIDE})
    kinds = [{"id": label + 1, "name": name} for label, name in enumerate(COLOURS)]
    content = {"images": images, "annotations": boxes, "categories": kinds}
    (folder / f"{split}.json").write_text(json.dumps(content, default=int))


@pytest.fixture
def setup(tmp_path):
    """A folder with images, boxes and a teacher; all is well."""
    numerics._warn_once.cache_clear()
    (tmp_path / "images").mkdir()
    for split in IMAGES:
        paint(tmp_path, split)
    (tmp_path / "teacher.yaml").write_text(TEACHER)
    save_teacher(tmp_path, trained)
    yield tmp_path
    for name in NAMES.values():
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def save_teacher(folder: Path, change) -> None:
    torch.manual_seed(0)
    state = build_student(load_config(str(folder / "teacher.yaml"), [])).state_dict()
    change(state)
    torch.save({"model": state}, folder / "teacher.pth")


def trained(state) -> None:
    state["backbone.fpn_output3.norm.bias"].fill_(0.1)  # training changes one bias at least


@pytest.fixture
def words(setup, small_arguments):
    """``words(*overrides)``: those that make the digits configuration one of this set-up."""

    def make(*more: object) -> list[str]:
        sets = [
            word
            for split, name in NAMES.items()
            for leaf, value in (
                ("NAME", name), ("JSON", setup / f"{split}.json"), ("IMAGES", setup / "images")
            )
            for word in (f"DATASETS.COCO_{split.upper()}.{leaf}", str(value))
        ]  # fmt: skip
        return small_arguments(
            *("OUTPUT_DIR", str(setup / "run"), "MODEL.RETINANET.NUM_CLASSES", "3"),
            *("MODEL.PIXEL_MEAN", "[40.0, 40.0, 40.0]", "MODEL.PIXEL_STD", "[40.0, 40.0, 40.0]"),
            *("DISTILL.TEACHER.CONFIG_FILE", str(setup / "teacher.yaml")),
            *("DISTILL.TEACHER.OPTS", "[]", "DISTILL.TEACHER.RANDOM_WEIGHTS", "False"),
            *("DISTILL.TEACHER.WEIGHTS", str(setup / "teacher.pth"), *sets),
            *(str(word).replace("{}", str(setup)) for word in more),
        )

    return make


@pytest.fixture
def findings_of(words, tmp_path_factory):
    """``findings_of(*overrides, until=, config=)``: what -> status and text, up to a line."""

    def look(*overrides: object, until: str = "disk", config: str = "pcka"):
        aside = tmp_path_factory.mktemp("aside")
        made = Examination(str(DIGITS / f"{config}.yaml"), words(*overrides), aside).checks()
        last = [what for what, _ in made].index(until)
        return {what: (status, text) for what, status, text in examine(made[: last + 1])}

    return look


def test_a_set_up_that_is_well_passes_every_check_and_leaves_nothing_behind(setup, findings_of):
    before = sorted(setup.rglob("*"))
    found = findings_of()
    assert {what: status for what, (status, _) in found.items()} == dict.fromkeys(found, PASS), (
        found
    )
    assert sorted(setup.rglob("*")) == before
    texts = {what: text for what, (_, text) in found.items()}
    assert texts["configuration"] == f"RetinaNet, PCKA, into {setup / 'run'}"
    assert "10 images with 30 boxes to train on, 4 to evaluate on, of 3 classes" in texts["data"]
    assert "teacher.pth: complete, finds 30 of 30 objects in 10 images" in texts["teacher"]
    assert texts["teacher's pixels"].startswith("100.00 % of the objects in 10 images; no other")
    assert "p3 32x16x16 from 32x16x16, p4 32x8x8 from 32x8x8" in texts["models and levels"]
    assert texts["a step"].startswith("cls ") and ", pcka_p5_rows " in texts["a step"]
    assert "MiB a step" in texts["cost"] and "the run" in texts["cost"]
    assert texts["disk"].endswith("(151 checkpoints)")  # 300 steps, and one each 2


def no_annotations(folder: Path) -> None:
    (folder / "train.json").unlink()


def no_image(folder: Path) -> None:
    (folder / "images" / "train7.png").unlink()


def broken_image(folder: Path) -> None:
    (folder / "images" / "test2.png").write_bytes(b"no image")


def untrained(folder: Path) -> None:
    save_teacher(folder, lambda state: None)


def blind(folder: Path) -> None:
    def dim(state):
        trained(state)
        state["bright"].fill_(99.0)

    save_teacher(folder, dim)


def another_model(folder: Path) -> None:
    wider = ["MODEL.RESNETS.RES2_OUT_CHANNELS", "32"]
    state = build_student(load_config(str(folder / "teacher.yaml"), wider)).state_dict()
    torch.save({"model": state}, folder / "teacher.pth")


def rgb(folder: Path) -> None:
    (folder / "teacher.yaml").write_text(TEACHER.replace("FORMAT: BGR", "FORMAT: RGB"))


def a_run(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "last_checkpoint").write_text("model_0000001.pth")


def nothing(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("break_it", "overrides", "what", "status", "message"),
    [
        (nothing, ("SOLVER.MAX_ITERS", 3), "configuration", FAIL, r"SOLVER\.MAX_ITERS"),
        (nothing, ("DISTILL.LEVEL", "[p3]"), "configuration", FAIL, r"unknown key.*DISTILL.LEVELS"),
        (nothing, ("DISTILL.METHODS", "[PCKB]"), "configuration", FAIL, "unknown.*'PCKB'.*PCKA"),
        (nothing, ("SOLVER.STEPS", "(90, 900)"), "configuration", WARN, "not fall at 900, beyond"),
        (nothing, ("SOLVER.WARMUP_ITERS", 300), "configuration", WARN, "before it peaks"),
        (a_run, (), "configuration", WARN, r"run \(last_checkpoint\); continue it with --"),
        (no_annotations, (), "data", FAIL, r"COCO_TRAIN\.JSON: there is no file .*train\.json"),
        (no_image, (), "data", FAIL, r"1 of its 10 images are not in .*: train7\.png"),
        (broken_image, (), "data", FAIL, r"test2\.png: the image or its annotations cannot be"),
        (nothing, ("MODEL.RETINANET.NUM_CLASSES", 4), "data", FAIL, "3 categories, the model 4"),
        (
            nothing,
            ("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"),
            *("student's pixels", WARN, r"far from 0 and 1; check .*these images have \[\d\d\."),
        ),
        (nothing, ("DISTILL.TEACHER.WEIGHTS", "no.pth"), "teacher", FAIL, r"no\.pth: cannot be"),
        (untrained, (), "teacher", FAIL, "holds the weights of an untrained model"),
        (blind, (), "teacher", FAIL, "finds none of 30 objects in 10 images"),
        (another_model, (), "teacher", FAIL, r"weights are missing.* describe this model\?"),
        (
            rgb,
            (),
            *("teacher's pixels", FAIL),
            r"channels: 100\.00 % with BGR, as .* 33\.33 %.*; set INPUT\.FORMAT BGR in .*\.yaml",
        ),
        (
            nothing,
            ("DISTILL.TEACHER.OPTS", "['MODEL.PIXEL_STD', [110.0, 110.0, 110.0]]"),
            *("teacher's pixels", FAIL),
            r"statistics: 100\.00 % with ImageNet's, .* 33\.33 %.*PIXEL_MEAN \[103\.5, 116\.3",
        ),
        (nothing, ("DISTILL.LEVELS", "[p9]"), "models and levels", FAIL, "'p9'.*does not have"),
        (
            nothing,
            ("DISTILL.PCKA.PATCH_SIZES", "[16]"),
            *("models and levels", WARN, r"level p4 .* has 1 patch\(es\) .* a patch of 2 would"),
        ),
        (nothing, ("MODEL.WEIGHTS", "no.pth"), "models and levels", FAIL, r"MODEL\.WEIGHTS: .*no"),
        (
            nothing,
            ("DISTILL.METHODS", "[FCKA]"),
            *("a step", WARN, r"p3: .* constant for 2 sample\(s\), .* a larger batch"),
        ),
        (nothing, ("DISTILL.PCKA.WEIGHTS", "[1.0e+39]"), "a step", FAIL, "infinite or NaN"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(setup, findings_of, break_it, overrides, what, status, message):
    break_it(setup)
    found = findings_of(*overrides, until=what)
    assert found[what][0] == status, found
    assert re.search(message, found[what][1]), found[what]
    # Whatever comes before it is well.
    assert {other: s for other, (s, _) in found.items() if other != what} == dict.fromkeys(
        [other for other in found if other != what], PASS
    )


def test_a_disk_too_small_is_named(findings_of, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 30, 1000))
    status, text = findings_of()["disk"]
    assert status == FAIL and "make room, set a larger SOLVER.CHECKPOINT_PERIOD" in text


def test_what_needs_something_that_failed_is_not_looked_at(setup, findings_of):
    untrained(setup)
    found = findings_of()
    assert found["teacher's pixels"][0] == SKIP
    assert found["models and levels"] == (SKIP, "skipped: needs the teacher")
    assert found["disk"] == (SKIP, "skipped: needs the step")


def test_a_teacher_of_other_classes_or_without_its_head_teaches_by_its_maps(setup, findings_of):
    other = ("DISTILL.TEACHER.OPTS", "['MODEL.ROI_HEADS.NUM_CLASSES', 80]")
    found = findings_of(*other, until="teacher's pixels")
    assert "has other classes (80) than the data (3)" in found["teacher"][1]
    assert [found[what][0] for what in ("teacher", "teacher's pixels")] == [PASS, SKIP]

    def headless(state):
        trained(state)
        del state["bright"]

    save_teacher(setup, headless)
    found = findings_of(until="models and levels")
    assert found["teacher"] == (PASS, found["teacher"][1])
    assert "its backbone is complete, but its head is not" in found["teacher"][1]
    assert found["models and levels"][0] == PASS


@pytest.mark.parametrize("form", ["VOC", "YOLO"])
def test_boxes_of_other_formats_are_converted_aside(
    small_arguments, own_boxes, own_keys, tmp_path, form
):
    aside, run = tmp_path / "aside", tmp_path / "run"
    keys = small_arguments("OUTPUT_DIR", str(run), *own_keys(form, own_boxes(form)))
    checks = Examination(str(DIGITS / "student.yaml"), keys, aside).checks()
    found = {what: status for what, status, _ in examine(checks[:3])}
    assert found["data"] == PASS and not run.exists()
    assert len(list((aside / "annotations").iterdir())) == 2


def test_a_student_without_teacher(findings_of):
    found = findings_of(config="student")
    assert found["teacher"] == (PASS, "none: the student learns without one")
    assert found["teacher's pixels"][0] == SKIP
    others = {status for what, (status, _) in found.items() if what != "teacher's pixels"}
    assert others == {PASS}


def test_reversed_means_of_a_student_are_named(small_config):
    generator = torch.Generator().manual_seed(0)
    image = 20 * torch.randn(3, 40, 40, generator=generator)
    image += torch.tensor([60.0, 100.0, 180.0])[:, None, None]
    keys = ("MODEL.PIXEL_STD", "[20.0, 20.0, 20.0]")
    meant = small_config("student", "MODEL.PIXEL_MEAN", "[60.0, 100.0, 180.0]", *keys)
    assert check_student(meant, [image]).status == PASS
    turned = small_config("student", "MODEL.PIXEL_MEAN", "[180.0, 100.0, 60.0]", *keys)
    status, text = check_student(turned, [image])
    assert status == WARN
    assert "fits the images better in reverse" in text and "or set INPUT.FORMAT RGB" in text


def test_means_alone_are_usual_with_weights_of_caffe(small_config):
    image = 60 * torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(0)) + 110
    keys = ("MODEL.PIXEL_MEAN", "[103.5, 116.3, 123.7]", "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]")
    assert check_student(small_config("student", *keys), [image]).status == WARN
    started = small_config("student", *keys, "MODEL.WEIGHTS", "R-50.pkl")
    assert check_student(started, [image]).status == PASS


def test_a_segmenter_is_tried_with_other_pixels_too(small_config, monkeypatch):
    cfg = small_config("../digits_pixels/pcka")
    register_datasets(cfg)
    dataset = training_set(cfg)
    teacher = build_teacher(cfg, with_head=True)
    labels, right = Labels.of(cfg), torch.tensor(103.53)
    by_image = {}

    def classify(self, image, *size):
        truth = by_image[int(image.long().sum())]
        knows = torch.isclose(self.detector.pixel_mean.flatten()[0], right)
        return truth.clamp(max=labels.classes - 1) if knows else torch.zeros_like(truth)

    read = make_mapper(cfg, training=False)
    for entry in dataset:
        by_image[int(read(entry)["image"].long().sum())] = read_truth(labels, entry)
    monkeypatch.setattr(TeacherDetector, "classify", classify)
    status, text = check_teacher_pixels(teacher, cfg, "BGR", dataset)
    assert status == FAIL
    assert "statistics: 100.00 % with ImageNet's" in text and "(mIoU) in 8 images" in text
    assert teacher.model.detector.pixel_mean.flatten()[0] == 127.5  # as it was
    right.fill_(127.5)
    assert check_teacher_pixels(teacher, cfg, "BGR", dataset).status == PASS


def test_a_segmenter_with_a_random_teacher_is_warned_of(small_arguments, tmp_path):
    file = str(DIGITS.parent / "digits_pixels" / "pcka.yaml")
    keys = small_arguments("OUTPUT_DIR", str(tmp_path / "run"))
    found = {f.what: f for f in examine(Examination(file, keys, tmp_path).checks())}
    assert found["data"].text.startswith("8 images with label images to train on")
    assert found["teacher"].status == WARN and "RANDOM_WEIGHTS" in found["teacher"].text
    assert found["a step"].status == PASS and "sem_seg" in found["a step"].text


@pytest.mark.parametrize("method", ["PCKA", "NOPE"])
def test_the_command_finds_the_trainer_and_ends_with_its_status(
    setup, words, monkeypatch, capsys, method
):
    monkeypatch.setattr(doctor, "machine_checks", lambda **_: [])
    no_image(setup)
    given = ["--config-file", str(DIGITS / "pcka.yaml"), *words("DISTILL.METHODS", f"[{method}]")]
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", *given])
    assert end.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines if str(setup) not in line)
    assert lines[-1] == "1 of 9 checks failed, 0 warned"


def test_without_detectron2_the_configuration_is_not_looked_at(monkeypatch, capsys):
    def refuse(_):
        raise ModuleNotFoundError("No module named 'detectron2'", name="detectron2")

    monkeypatch.setattr(doctor, "machine_checks", lambda **_: [])
    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    (finding,) = doctor.main(["--config-file", str(DIGITS / "pcka.yaml")])
    assert finding == ("configuration", SKIP, "skipped: needs detectron2")
    assert "skipped: needs detectron2" in capsys.readouterr().out
