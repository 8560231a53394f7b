"""A detector small enough to train in seconds, and the data it trains on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import detection.fcos
import detection.gfl
import detection.meta_arch
import detection.reppoints  # noqa: F401  (they register themselves)
from detection import train_net
from detection.config import PROJECT, build_student, load_config, teacher_config
from detection.data.digits import digits_scenes

DIGITS = PROJECT / "configs" / "detection" / "digits"
SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "16",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "4",
    "MODEL.FPN.OUT_CHANNELS", "32",
    "MODEL.RETINANET.NUM_CONVS", "1",
    "MODEL.RETINANET.NORM", "",
    "DATASETS.DIGITS.SIDE", "128",
    "DATASETS.DIGITS.TRAIN_IMAGES", "8",
    "DATASETS.DIGITS.TEST_IMAGES", "4",
    "INPUT.MIN_SIZE_TRAIN", "[128]",
    "INPUT.MAX_SIZE_TRAIN", "128",
    "INPUT.MIN_SIZE_TEST", "128",
    "INPUT.MAX_SIZE_TEST", "128",
    "SOLVER.IMS_PER_BATCH", "2",
    "DISTILL.PCKA.PATCH_SIZES", "[4, 4, 2]",
    "SOLVER.CHECKPOINT_PERIOD", "2",
    "REPORT", "False",
]  # fmt: skip
PLAIN_DETECTRON2 = """
import json, os, sys, torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
config, weights, image = sys.argv[1:]
if "lazy" in config:
    sys.path.insert(0, os.path.dirname(config))  # modules that came along
    lazy = LazyConfig.load(config)
    assert lazy.input_format == "BGR"
    model = instantiate(lazy.model)
else:
    cfg = get_cfg()
    cfg.merge_from_file(config)
    cfg.MODEL.DEVICE = "cpu"
    assert cfg.INPUT.FORMAT == "BGR"
    assert cfg.MODEL.WEIGHTS == weights
    model = build_model(cfg)
DetectionCheckpointer(model).load(weights)
found = model.eval()([{"image": torch.load(image)}])[0]["instances"]
assert not [name for name in sys.modules if name.partition(".")[0] in ("pcka", "detection")]
print(json.dumps([found.pred_boxes.tensor.tolist(), found.scores.tolist()]))
"""
# Of an FCOS, GFL or RepPoints in the place of the RetinaNet, for ResNets of the usual widths.
SMALL_POINTS = [
    "MODEL.RESNETS.DEPTH", "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "64",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "64",
    "MODEL.FPN.OUT_CHANNELS", "64",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "64",
    "MODEL.BACKBONE.NAME", "build_p6p7_resnet_fpn_backbone",
    "MODEL.FPN.P6P7.IN_FEATURE", "p5",
    "MODEL.FCOS.NUM_CLASSES", "10",
    "MODEL.GFL.NUM_CLASSES", "10",
    "MODEL.REPPOINTS.NUM_CLASSES", "10",
]  # fmt: skip
UNTRAINED_TEACHER = ["DISTILL.TEACHER.WEIGHTS", "", "DISTILL.TEACHER.RANDOM_WEIGHTS", "True"]
SMALL_TEACHER = str(["MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.FPN.OUT_CHANNELS", 32])


def small_overrides(scenes: Path, *more: str) -> list[str]:
    """Overrides for the digits configurations: small models, few scenes, an untrained teacher."""
    own = ["DATASETS.DIGITS.ROOT", str(scenes), "DISTILL.TEACHER.OPTS", SMALL_TEACHER]
    return [*SMALL, *UNTRAINED_TEACHER, *own, *more]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Where the session's digits scenes are."""
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="session")
def small_arguments(scenes):
    """``small_arguments(*overrides)``: overrides that make a digits configuration small."""
    return lambda *more: small_overrides(scenes, *more)


@pytest.fixture(scope="session")
def arguments(small_arguments):
    """``arguments(folder, steps, *overrides, config=, flags=)``: of the training command."""

    def make(folder, steps, *more, config="pcka", flags=()):
        keys = ["OUTPUT_DIR", str(folder), "SOLVER.MAX_ITER", str(steps), *more]
        file = str(DIGITS / f"{config}.yaml")
        return ["--config-file", file, *flags, *small_arguments(*keys)]

    return make


@pytest.fixture(scope="session")
def taught_run(tmp_path_factory, arguments):
    """The folder of a run that wrote its report, from a teacher in the file beside it."""
    folder = tmp_path_factory.mktemp("reported")
    weights = folder / "teacher.pth"
    # Wider, so that there are adapters; without norms, which maps of one pixel do not take.
    teacher = str(["MODEL.FPN.OUT_CHANNELS", 40, "MODEL.RETINANET.NORM", ""])
    keys = ["DISTILL.TEACHER.WEIGHTS", str(weights), "DISTILL.TEACHER.OPTS", teacher]
    words = arguments(folder / "run", 4, *keys)
    cfg = load_config(words[1], words[2:])
    torch.manual_seed(0)
    torch.save({"model": build_student(teacher_config(cfg)).state_dict()}, weights)
    more = "REPORT", "True", "DISTILL.LOG_PERIOD", "2", "SOLVER.STEPS", "[3, 9]"
    train_net.main([*words, *more])
    return folder / "run"


@pytest.fixture
def small_config(scenes):
    """``small_config(name, *overrides)``: a configuration of the digits folder, made small."""
    return lambda name, *more: load_config(
        str(DIGITS / f"{name}.yaml"), small_overrides(scenes, *more)
    )


@pytest.fixture
def build(small_config):
    """``build(*overrides)``: a distilled detector, freshly seeded."""

    def make(*more: str, config: str = "pcka"):
        torch.manual_seed(0)
        return build_model(small_config(config, *more))

    return make


@pytest.fixture(scope="session")
def small_fcos():
    """Overrides that make a student an FCOS."""
    return ("DISTILL.STUDENT", "FCOS", *SMALL_POINTS)


@pytest.fixture(scope="session")
def small_gfl():
    """Overrides that make a student a GFL."""
    return ("DISTILL.STUDENT", "GFL", *SMALL_POINTS, "MODEL.FPN.P6P7.RELU", "False")


@pytest.fixture(scope="session")
def small_reppoints():
    """Overrides that make a student a RepPoints."""
    own = ("MODEL.FPN.P6P7.IN_FEATURE", "res5", "MODEL.FPN.P6P7.RELU", "False")
    return ("DISTILL.STUDENT", "RepPoints", *SMALL_POINTS, *own)


@pytest.fixture(scope="session")
def own_detector(small_fcos, small_gfl, small_reppoints):
    """``own_detector(architecture)``: overrides that make a student one; none of a RetinaNet."""
    kinds = {"FCOS": small_fcos, "GFL": small_gfl, "RepPoints": small_reppoints}
    return lambda architecture: kinds.get(architecture, ())


@pytest.fixture
def batch():
    """Two images of unlike sizes, the second without any object."""
    generator = torch.Generator().manual_seed(0)
    entries = []
    for height, width, boxes in ((128, 96, [[8.0, 8, 40, 50]]), (100, 128, [])):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
        instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        entries.append({"image": image, "height": height, "width": width, "instances": instances})
    return entries


@pytest.fixture
def storage():
    """What detectron2's models write their counts to."""
    with EventStorage() as events:
        yield events


@pytest.fixture
def assert_same_boxes_in_plain_detectron2(tmp_path):
    """``check(exported, student, image)``: in a process that never imports this project.

    ``exported`` is the configuration that the export wrote, beside the weights.
    """

    def check(exported: Path, student: torch.nn.Module, image: torch.Tensor) -> None:
        torch.save(image, tmp_path / "image.pt")
        files = [str(exported), str(exported.parent / "model.pth"), str(tmp_path / "image.pt")]
        command = [sys.executable, "-W", "ignore", "-c", PLAIN_DETECTRON2, *files]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        boxes, scores = map(torch.tensor, json.loads(done.stdout.splitlines()[-1]))
        with torch.no_grad(), EventStorage():
            expected = student.eval()([{"image": image}])[0]["instances"]
        assert len(scores)
        torch.testing.assert_close(boxes, expected.pred_boxes.tensor)
        torch.testing.assert_close(scores, expected.scores)

    return check


SPLITS = {"train": ("train", 8), "val": ("test", 4)}  # split -> that of the digits, and its images
SIDE = 128
XML_OBJECT = (
    "<object><name>{name}</name><difficult>{crowd}</difficult><bndbox><xmin>{left}</xmin>"
    "<ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
)


def _scenes_with_boxes(scenes: Path) -> Iterator[tuple[str, Path, list[tuple[int, list[int]]]]]:
    """Split, image, and its objects, each a class from 0 and x, y, width, height."""
    for split, (of_digits, images) in SPLITS.items():
        annotations, folder = digits_scenes(scenes, of_digits, images, SIDE)
        content = json.loads(annotations.read_text())
        for entry in content["images"]:
            yield split, folder / entry["file_name"], [
                (box["category_id"] - 1, box["bbox"])
                for box in content["annotations"]
                if box["image_id"] == entry["id"]
            ]  # fmt: skip


def _write_voc(scenes: Path, root: Path) -> None:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join("0123456789"))
    for split, image, objects in _scenes_with_boxes(scenes):
        name = f"{split}_{image.stem}"
        shutil.copy(image, root / "JPEGImages" / f"{name}.png")
        found = "".join(
            XML_OBJECT.format(name=kind, crowd=0, left=x + 1, top=y + 1, right=x + w, bottom=y + h)
            for kind, (x, y, w, h) in objects
        )
        size = f"<size><width>{SIDE}</width><height>{SIDE}</height></size>"
        content = f"<annotation><filename>x.jpg</filename>{size}{found}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(content)
        with (root / "ImageSets" / "Main" / f"{split}.txt").open("a") as listing:
            listing.write(f"{name}\n")


def _write_yolo(scenes: Path, root: Path) -> None:
    for split, image, objects in _scenes_with_boxes(scenes):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, root / "images" / split)
        lines = (
            f"{kind} {(x + w / 2) / SIDE} {(y + h / 2) / SIDE} {w / SIDE} {h / SIDE}\n"
            for kind, (x, y, w, h) in objects
        )
        (root / "labels" / split / f"{image.stem}.txt").write_text("".join(lines))
    names = "".join(f"  {digit}: '{digit}'\n" for digit in range(10))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames:\n{names}")


@pytest.fixture
def own_boxes(scenes, tmp_path):
    """``own_boxes(form)``: a folder with the digits scenes in the format "VOC" or "YOLO"."""

    def write(form: str) -> Path:
        root = tmp_path / form
        {"VOC": _write_voc, "YOLO": _write_yolo}[form](scenes, root)
        return root

    return write


@pytest.fixture
def own_keys():
    """``own_keys(form, root)``: the overrides that name such a folder, to train and to test on."""

    def keys(form: str, root: Path) -> list[str]:
        return [
            word
            for split in ("TRAIN", "TEST")
            for leaf, value in (("NAME", f"{form}_{split}"), ("ROOT", str(root)))
            for word in (f"DATASETS.{form}_{split}.{leaf}", value)
        ]

    yield keys
    for name in {f"{form}_{split}" for form in ("VOC", "YOLO") for split in ("TRAIN", "TEST")}:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
