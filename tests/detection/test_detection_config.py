from __future__ import annotations

import re
import sys

import pytest
import yaml
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY

import detection.meta_arch  # noqa: F401
from detection.config import (
    PROJECT,
    build_student,
    detection_config,
    load_config,
    section_defaults,
    student_architecture,
    teacher_config,
)
from detection.levels import build_losses
from detection.teacher import build_teacher
from pcka.engine.config import ConfigError
from pcka.engine.distill import changed_settings
from pcka.losses import registry

FILES = sorted((PROJECT / "configs" / "detection").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_file_loads_and_names_a_model(path):
    cfg = load_config(str(path), [])
    assert cfg.MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY
    if cfg.MODEL.META_ARCHITECTURE == "DistilledDetector":
        assert cfg.DISTILL.STUDENT in META_ARCH_REGISTRY
        assert teacher_config(cfg).MODEL.WEIGHTS


def test_the_schedule_of_the_paper():
    cfg = load_config(str(PROJECT / "configs/detection/coco/retinanet_r50/student.yaml"), [])
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.STEPS, solver.BASE_LR) == (180000, (120000, 165000), 0.01)


NO_KEYS = "holds no keys with values"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", NO_KEYS),
        ("[1, 2]", NO_KEYS),
        ("hello", NO_KEYS),
        ("5", NO_KEYS),
        ("_BASE_: empty.yaml", NO_KEYS),
        ("_BASE_: odd.yaml", "its _BASE_ leads back to itself"),
        ("_BASE_: gone.yaml", r"its _BASE_ names '.*gone\.yaml', which does not exist"),
        ("SOLVER: 3", "SOLVER: expected a section of keys"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, content, message):
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "odd.yaml").write_text(content)
    with pytest.raises(ConfigError, match=rf"odd\.yaml: .*{message}") as caught:
        load_config(str(tmp_path / "odd.yaml"), [])
    assert "\n" not in str(caught.value)


def test_a_lazy_config_is_refused_in_words(tmp_path):
    (tmp_path / "model.py").write_text("model = 1")
    with pytest.raises(ConfigError, match=r"model\.py: a detectron2 LazyConfig; a YAML file"):
        load_config(str(tmp_path / "model.py"), [])


def test_code_in_a_file_is_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("SEED: !!python/object/apply:eval ['1 + 1']\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(str(path), [])


def test_a_key_that_a_file_sets_twice_is_refused_with_its_lines(tmp_path):
    """Also in a base, and in the teacher's file."""
    (tmp_path / "twice.yaml").write_text("SOLVER: {BASE_LR: 0.5}\nSEED: 3\nSOLVER: {MAX_ITER: 7}\n")
    (tmp_path / "own.yaml").write_text("_BASE_: twice.yaml\n")
    told = r'SOLVER is already set on line 1; merge the two in ".*twice\.yaml", line 3'
    for name in ("twice.yaml", "own.yaml"):
        with pytest.raises(ConfigError, match=rf"{name}: {told}"):
            load_config(str(tmp_path / name), [])
    cfg = detection_config()
    cfg.DISTILL.TEACHER.CONFIG_FILE = str(tmp_path / "own.yaml")
    with pytest.raises(ConfigError, match=told):
        teacher_config(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SOLVER.BASELR", "1", "unknown key 'SOLVER.BASELR'; near matches: SOLVER.BASE_LR"),
        ("NO.SUCH", "1", "unknown key 'NO.SUCH'; sections: VERSION, MODEL, "),
        ("SOLVER.BASE_LR", "fast", r"SOLVER.BASE_LR expects a float \(default .*\), got fast"),
        ("DISTILL.LEVEL", "[p3]", "unknown key 'DISTILL.LEVEL'; near matches: DISTILL.LEVELS"),
    ],
)
def test_a_mistake_is_told_with_where_it_was_made(small_config, key, value, message):
    with pytest.raises(ConfigError, match=f"^the command line: {message}"):
        small_config("pcka", key, value)
    cfg = small_config("pcka", "DISTILL.TEACHER.OPTS", str([key, value]))
    with pytest.raises(ConfigError, match=rf"^DISTILL\.TEACHER\.OPTS: {message}"):
        teacher_config(cfg)
    cfg.DISTILL.TEACHER.OPTS = [key, 3, "SEED"]
    with pytest.raises(ConfigError, match=f"expected pairs of KEY VALUE, got '{key} 3 SEED'"):
        teacher_config(cfg)


def test_an_int_serves_where_a_float_is_expected(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("VERSION: 2\nSOLVER: {BASE_LR: 1, GAMMA: 1}\n")
    cfg = load_config(str(path), ["SOLVER.GAMMA", "2", "INPUT.CROP.SIZE", "[96, 64]"])
    assert [str(cfg.SOLVER[key]) for key in ("BASE_LR", "GAMMA")] == ["1.0", "2.0"]
    assert [str(side) for side in cfg.INPUT.CROP.SIZE] == ["96", "64"]  # pixels, or shares


def test_unknown_keys_are_named(tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text("DISTILL: {METHOD: [PCKA]}\n")
    with pytest.raises(ConfigError, match=r"DISTILL\.METHOD"):
        load_config(str(path), [])


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.yaml"):
        load_config(str(tmp_path / "empty.yaml"), [])


@pytest.mark.parametrize(
    ("outer", "student", "message"),
    [
        ("RetinaNet", "RetinaNet", r"'RetinaNet' would train without DISTILL; set it to 'Distil"),
        ("RetinaNett", "", r"META_ARCHITECTURE: unknown 'RetinaNett'; registered: .*RetinaNet"),
        ("DistilledDetector", "Retina", r"DISTILL.STUDENT: unknown 'Retina'; registered: .*"),
        ("DistilledDetector", "", r"DISTILL.STUDENT: expected a meta-architecture"),
    ],
)
def test_a_student_that_cannot_be_built_or_distilled_is_refused(outer, student, message):
    cfg = detection_config()
    cfg.MODEL.META_ARCHITECTURE, cfg.DISTILL.STUDENT = outer, student
    with pytest.raises(ConfigError, match=message):
        student_architecture(cfg)


def test_a_students_architecture_is_named_wrapped_or_not():
    cfg = detection_config()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    assert student_architecture(cfg) == "RetinaNet"
    cfg.MODEL.META_ARCHITECTURE, cfg.DISTILL.STUDENT = "DistilledDetector", "FCOS"
    assert student_architecture(cfg) == "FCOS"


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 48], "48.* divisible by .*32"),
        (["MODEL.FPN.IN_FEATURES", ["res3", "res7"]], "KeyError: 'res7' .*line"),
    ],
)
def test_keys_that_detectron2_builds_nothing_of_are_told_with_the_place(
    small_config, who, opts, message
):
    given = ["DISTILL.TEACHER.OPTS", str(opts)] if who == "teacher" else list(map(str, opts))
    cfg = small_config("pcka", *given)
    section = "the teacher's MODEL" if who == "teacher" else "MODEL"
    build = build_teacher if who == "teacher" else build_student
    with pytest.raises(ConfigError, match=f"^{section}: cannot be built .*{message}"):
        build(cfg)


@pytest.mark.parametrize("opts", ["[MODEL.RESNETS.DEPTH, 18, 3]", "[18, MODEL.RESNETS.DEPTH]"])
def test_the_teachers_keys_stand_in_pairs(small_config, opts):
    with pytest.raises(ConfigError, match=r"^DISTILL\.TEACHER\.OPTS: expected pairs of KEY VALUE"):
        teacher_config(small_config("pcka", "DISTILL.TEACHER.OPTS", opts))


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere.yaml"):
        load_config("nowhere.yaml", [])


def test_a_loss_has_its_section_by_being_named(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("VERSION: 2\nDISTILL: {METHODS: [PKD], MGD: {WEIGHTS: 3}}\n")
    cfg = load_config(str(path), ["DISTILL.CWD.STAGES", "['p4']"])
    assert {"PKD", "MGD", "CWD"} < cfg.DISTILL.keys()
    assert not {"PCKA", "KD"} & cfg.DISTILL.keys()
    assert cfg.DISTILL.MGD.WEIGHTS == [3.0]  # a single value serves all levels
    assert cfg.DISTILL.PKD.STAGES == []
    with pytest.raises(ConfigError, match=r"unknown key 'DISTILL.PKD.WIGHTS'; .*PKD.WEIGHTS"):
        load_config(str(path), ["DISTILL.PKD.WIGHTS", "3"])
    with pytest.raises(ConfigError, match=r"expected pairs of KEY VALUE, got 'DISTILL.METHODS'"):
        load_config(str(path), ["DISTILL.METHODS"])


OWN_LOSS = """
from pcka import losses


@losses.register("AT_OF_MINE")
class Mine(losses.AT):
    pass
"""


def test_a_loss_of_ones_own_is_used_from_a_module_that_imports_names(tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text(OWN_LOSS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(registry, "_REGISTERED", {})
    path = tmp_path / "run.yaml"
    path.write_text("IMPORTS: [my_loss]\nDISTILL: {METHODS: [AT_OF_MINE], AT_OF_MINE: {P: 1}}\n")
    try:
        cfg = load_config(str(path), ["IMPORTS", "[json]", "DISTILL.AT_OF_MINE.WEIGHTS", "2"])
    finally:
        sys.modules.pop("my_loss", None)
    assert cfg.IMPORTS == ["my_loss", "json"]
    (built,) = build_losses(cfg, {"p3": "p3"}, {"p3": ShapeSpec(channels=8, stride=8)})
    assert (type(built).__name__, built.weights, built.p) == ("Mine", (2.0,), 1.0)


def test_a_saved_configuration_with_the_sections_of_all_losses_is_the_same(small_config, tmp_path):
    cfg = small_config("pcka")
    saved = yaml.safe_load(cfg.dump())
    saved["DISTILL"] |= {name: section_defaults(name) for name in ("AT", "FCKA", "FITNET", "MGD")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(saved))
    assert changed_settings(load_config(str(path), []), cfg) == {}
    cfg.DISTILL.PCKA.CENTER = False
    assert list(changed_settings(load_config(str(path), []), cfg)) == ["DISTILL.PCKA.CENTER"]


@pytest.mark.parametrize(
    ("used", "unused"), [("YOLO_TRAIN", "COCO_TRAIN"), ("COCO_TRAIN", "YOLO_TRAIN")]
)
def test_the_files_of_own_boxes_that_the_docs_show_are_configurations(
    used, unused, tmp_path, monkeypatch
):
    page = (PROJECT / "docs" / "data.md").read_text()
    teacher, in_coco, taught = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    if used == "COCO_TRAIN":
        teacher = re.sub(r"DATASETS:\n(  .*\n)+", in_coco, teacher)
    student = teacher.replace("bccd/teacher.yaml", "bccd/pcka.yaml") + taught
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    (tmp_path / "cells_teacher.yaml").write_text(teacher)
    (tmp_path / "cells_pcka.yaml").write_text(student)
    monkeypatch.chdir(tmp_path)
    cfg = load_config("cells_pcka.yaml", [])
    assert cfg.DATASETS[unused].NAME == "" and cfg.DATASETS[used].NAME == "cells_train"
    assert cfg.DISTILL.METHODS == ["PCKA"] and student_architecture(cfg) == "RetinaNet"
    assert teacher_config(cfg).MODEL.RESNETS.RES2_OUT_CHANNELS == 64
    assert teacher_config(cfg).OUTPUT_DIR == "output/cells_teacher"
