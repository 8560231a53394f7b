from __future__ import annotations

from pathlib import Path

import pytest

from classification.config import (
    ConfigError,
    changed_keys,
    config_from_text,
    load_config,
)
from pcka import losses

CONFIGS = Path(__file__).parents[2] / "configs" / "classification"


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text("STUDENT: {NAME: resnet8}\nDATA: {NAME: digits}\n" + text)
    return path


def refusal(path, overrides=()):
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


def test_every_loss_has_its_section_with_its_defaults():
    cfg = load_config(None, ["STUDENT.NAME", "resnet8", "DATA.NAME", "digits"])
    for name in losses.names():
        section = {
            key.lower(): tuple(value) if isinstance(value, list) else value
            for key, value in cfg.DISTILL[name].items()
        }
        assert section == losses.defaults(name)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}")
def test_the_shipped_configurations_are_read(path):
    if path.parent.name == "methods":
        load_config(path, ["STUDENT.NAME", "resnet8", "DATA.NAME", "digits"])
    else:
        load_config(path)


def test_the_published_presets():
    rcka = load_config(CONFIGS / "cifar100" / "rcka.yaml")
    assert rcka.DISTILL.METHODS == ["CE", "RCKA"]
    assert rcka.DISTILL.CE.WEIGHT == 1
    assert rcka.DISTILL.RCKA.STAGES == ["stage3"]
    assert rcka.DISTILL.RCKA.FEATURE_WEIGHTS == [10]
    assert rcka.DISTILL.RCKA.INTRA_WEIGHT == rcka.DISTILL.RCKA.INTER_WEIGHT == 15
    mixed = load_config(CONFIGS / "cifar100" / "kd_fcka.yaml")
    assert mixed.DISTILL.METHODS == ["CE", "KD", "FCKA"]
    assert (mixed.DISTILL.CE.WEIGHT, mixed.DISTILL.KD.WEIGHT) == (0.1, 0.9)
    assert mixed.DISTILL.FCKA.STAGES == ["stage1", "stage2", "stage3"]
    assert mixed.DISTILL.FCKA.WEIGHTS == [2.5, 2.5, 5.0]
    assert mixed.SOLVER.MILESTONES == [150, 180, 210]


def test_a_base_gives_what_the_file_does_not(tmp_path):
    write(tmp_path, "SEED: 3\nLOG_EVERY: 7\n", "base.yaml")
    child = tmp_path / "child.yaml"
    child.write_text("_BASE_: base.yaml\nSEED: 4\n")
    cfg = load_config(child)
    assert (cfg.SEED, cfg.LOG_EVERY, cfg.STUDENT.NAME) == (4, 7, "resnet8")


def test_an_unknown_key_of_a_file_is_refused_with_near_matches(tmp_path):
    path = write(tmp_path, "SOLVER: {BASE_RL: 0.1}\n")
    message = refusal(path)
    assert "unknown key 'SOLVER.BASE_RL'" in message
    assert "SOLVER.BASE_LR" in message
    assert str(path) in message


def test_an_unknown_key_of_the_command_line_is_refused_with_near_matches(tmp_path):
    message = refusal(write(tmp_path, ""), ["TEMPERATURE", "4"])
    assert "the command line: unknown key 'TEMPERATURE'" in message
    assert "DISTILL.KD.TEMPERATURE" in message


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system"]
)
def test_yaml_that_would_run_code_is_refused(tmp_path, tag):
    assert "only plain YAML values are read" in refusal(write(tmp_path, f"OUTPUT_DIR: {tag}\n"))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [", "_BASE_: circle.yaml"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "circle.yaml"
    path.write_text(text)
    assert str(path) in refusal(path)


def test_a_missing_file_is_refused(tmp_path):
    assert "no.yaml: cannot be read" in refusal(tmp_path / "no.yaml")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.WEIGHT_DECAY", "1e-4", 1e-4),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("DATA.FLIP", "false", False),
        ("DATA.FLIP", "True", True),
        ("OUTPUT_DIR", "001", "001"),
        ("SOLVER.MILESTONES", "[]", []),
        ("DISTILL.METHODS", "[CE, KD]", ["CE", "KD"]),
        ("DISTILL.METHODS", '("CE", "KD")', ["CE", "KD"]),
        ("DISTILL.FCKA.WEIGHTS", "[1, 2.5]", [1.0, 2.5]),
        ("DISTILL.RCKA.TEMPERATURE", "4", 4),
        ("DISTILL.RCKA.TEMPERATURE", "null", None),
    ],
)
def test_words_of_the_command_line_become_values(tmp_path, key, text, value):
    cfg = load_config(write(tmp_path, ""), [key, text])
    for part in key.split("."):
        cfg = cfg[part]
    assert cfg == value
    assert type(cfg) is type(value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SEED"], "expected pairs of KEY VALUE, got 1 words"),
        (["SEED", "1.5"], "SEED expects a int .default 0., got 1.5"),
        (["DATA.FLIP", "1"], "DATA.FLIP expects a bool"),
        (["SOLVER.EPOCHS", "0"], "SOLVER.EPOCHS: expected at least 1, got 0"),
        (["SOLVER.SCHEDULE", "step"], "SOLVER.SCHEDULE: expected one of multistep, cosine"),
        (["AUTOCAST", "float16"], "AUTOCAST: expected one of"),
        (["STUDENT.PIXEL_STD", "[0.2]"], "STUDENT.PIXEL_STD: expected three numbers"),
        (["STUDENT.NAME", ""], "STUDENT.NAME: expected the name of a model"),
        (["DISTILL.METHODS", "[]"], "DISTILL.METHODS: expected one or more"),
        (["DISTILL.METHODS", "[CE, CE]"], "DISTILL.METHODS: expected .* each named once"),
        (["DISTILL.METHODS", "[CE, RKCA]"], "no loss is called 'RKCA'; near matches: .*RCKA"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, ""), overrides)


def test_a_saved_configuration_is_read_back(tiny_config):
    cfg = tiny_config("rcka")
    assert config_from_text(cfg.dump()) == cfg


def test_changed_keys_leave_out_the_harmless_ones(tiny_config):
    old = tiny_config()
    new = tiny_config(name="elsewhere", LOG_EVERY=3, **{"DATA.ROOT": "x", "SOLVER.MOMENTUM": 0.5})
    assert changed_keys(old, new) == ["SOLVER.MOMENTUM"]


@pytest.mark.parametrize(("schedule", "refused"), [("cosine", True), ("multistep", False)])
def test_more_epochs_continue_only_a_schedule_that_they_leave_alone(tiny_config, schedule, refused):
    old, new = (
        tiny_config(**{"SOLVER.SCHEDULE": schedule, "SOLVER.EPOCHS": epochs}) for epochs in (2, 4)
    )
    assert changed_keys(old, new) == (["SOLVER.EPOCHS"] if refused else [])
