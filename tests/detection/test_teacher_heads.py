"""What is tried of a teacher's head before a student learns from it."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, Instances

from detection import train_net
from detection.config import build_student, teacher_config
from detection.data import register_datasets
from detection.data.targets import training_set
from detection.teacher import TeacherDetector, build_teacher
from detection.teacher_checks import check_detections
from pcka.engine.config import ConfigError

NARROW = ("MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.FPN.OUT_CHANNELS", 32)
CROSSED = ("DISTILL.METHODS", "['CROSSKD']", "DISTILL.CROSSKD.DEPTH", "1")


@pytest.fixture
def taught(small_config, tmp_path):
    """``taught(change)``: a teacher with a head of changed weights, and its run."""

    def make(change=lambda state: None):
        # A group norm of 32 channels takes no map of one position, as P7 of these images is.
        options = ("DISTILL.TEACHER.OPTS", str([*NARROW, "MODEL.RETINANET.NORM", ""]))
        cfg = small_config("pcka", *options)
        torch.manual_seed(0)
        path = tmp_path / "taught.pth"
        state = build_student(teacher_config(cfg)).state_dict()
        state["backbone.fpn_output3.norm.bias"].fill_(0.1)  # training changes one bias at least
        change(state)
        torch.save({"model": state}, path)
        trained = ("DISTILL.TEACHER.WEIGHTS", str(path), "DISTILL.TEACHER.RANDOM_WEIGHTS", "False")
        return (*trained, *options)

    return make


def _read(small_config, keys):
    cfg = small_config("pcka", *keys)
    register_datasets(cfg)
    return build_teacher(cfg, with_head=True), cfg, training_set(cfg)


def test_a_teacher_that_detects_nothing_is_refused(small_config, taught):
    def silence(state):
        state["head.cls_score.weight"].zero_()
        state["head.cls_score.bias"].fill_(-9.0)

    keys = taught(silence)
    match = r"taught\.pth: the teacher finds none of \d+ objects in 8 images of DATASETS\.TRAIN"
    with pytest.raises(ConfigError, match=match):
        check_detections(*_read(small_config, keys))


@pytest.mark.parametrize("shift", [0.0, 400.0])
def test_a_teacher_that_detects_is_told_of(small_config, taught, monkeypatch, caplog, shift):
    """Boxes where the objects are, in the first image alone, and one of another class."""
    teacher, cfg, dataset = _read(small_config, taught())
    asked = iter(dataset)

    def detect(self, image, height, width):
        entry = next(asked)
        found = Instances((height, width))
        objects = entry["annotations"]
        corners = torch.tensor([one["bbox"] for one in objects])
        corners[:, 2:] += corners[:, :2]
        found.pred_boxes = Boxes(corners + shift)
        found.pred_classes = torch.tensor([one["category_id"] for one in objects])
        if entry is not dataset[0]:
            found.pred_classes += 1
        return found

    monkeypatch.setattr(TeacherDetector, "detect", detect)
    if shift:
        with pytest.raises(ConfigError, match="finds none"):
            check_detections(teacher, cfg, dataset)
        return
    with caplog.at_level("INFO", logger="detectron2.pcka"):
        check_detections(teacher, cfg, dataset)
    expected = len(dataset[0]["annotations"])
    assert f"The teacher finds {expected} of " in caplog.text


def test_a_teacher_detects_inside_what_it_detects_by_itself(small_config, taught, batch):
    own = ("INPUT.FORMAT", "RGB", "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
    rgb = str([*NARROW, "MODEL.RETINANET.NORM", "", *own])
    teacher, _, _ = _read(small_config, [*taught(), "DISTILL.TEACHER.OPTS", rgb])
    image = batch[0]["image"]
    with torch.no_grad():
        found = teacher.model.detect(image, 128, 96)
        alone = teacher.model.detector([{"image": image.flip(0), "height": 128, "width": 96}])
    assert len(found)
    assert torch.equal(found.scores, alone[0]["instances"].scores)


def test_weights_without_the_head_are_refused_where_a_method_needs_it(build, taught):
    keys = taught(lambda state: [state.pop(name) for name in list(state) if "head." in name])
    build(*keys)
    with pytest.raises(ConfigError, match=r"taught\.pth: \d+ of \d+ weights are missing: head\."):
        build(*keys, *CROSSED)


@pytest.mark.slow
def test_a_run_tries_the_teacher_before_its_first_step(tmp_path, arguments, taught):
    def silence(state):
        state["head.cls_score.weight"].zero_()
        state["head.cls_score.bias"].fill_(-9.0)

    for keys in (("DISTILL.TEACHER.HEAD", "True"), CROSSED):
        with pytest.raises(ConfigError, match="the teacher finds none of"):
            train_net.main(arguments(tmp_path / "run", 1, *taught(silence), *keys))
