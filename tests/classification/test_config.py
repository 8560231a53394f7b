from __future__ import annotations

from pathlib import Path

import pytest

from classification.config import (
    changed_keys,
    config_from_text,
    doubts,
    load_config,
    method_file,
    method_files,
)
from pcka.engine.config import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs" / "classification"


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text("STUDENT: {NAME: resnet8}\nDATA: {NAME: digits}\n" + text)
    return path


def refusal(path, overrides=()):
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


def test_only_the_losses_that_are_named_have_sections():
    words = ["STUDENT.NAME", "resnet8", "DATA.NAME", "digits", "DISTILL.NKD.GAMMA", "2"]
    cfg = load_config(None, words, "kd")
    named = {key for key, value in cfg.DISTILL.items() if hasattr(value, "keys")}
    assert named == {"CE", "KD", "NKD"}


RUNS = [
    path
    for path in sorted(CONFIGS.glob("*/*.yaml"))
    if path.parent.name != "methods" and path.stem != "base"
]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_shipped_configurations_are_read_with_every_method(path):
    plain = load_config(path)
    assert plain.DISTILL.METHODS == ["CE"]
    teacher, student = path.stem.split("_", 1)[0], path.stem.rsplit("_", 1)[1]
    assert teacher.casefold() in plain.TEACHER.NAME.casefold()
    assert student.casefold() in plain.STUDENT.NAME.casefold()
    for name in method_files(path):
        if (name, plain.SOLVER.OPTIMIZER) == ("kd_dot", "adamw"):
            with pytest.raises(ConfigError, match="DOT_DELTA: requires plain SGD"):
                load_config(path, method=name)
            continue
        cfg = load_config(path, method=name)
        assert (cfg.DISTILL.METHODS == ["CE"]) == (name == "ce")
        # A method says what is distilled and how, the configuration all else.
        assert all(key.startswith("DISTILL.") for key in changed_keys(plain, cfg))


def test_a_teacher_trains_by_itself():
    cfg = load_config(CONFIGS / "cifar100" / "teachers" / "resnet56.yaml")
    assert (cfg.STUDENT.NAME, cfg.TEACHER.NAME, cfg.DISTILL.METHODS) == ("resnet56", "", ["CE"])


def test_a_saved_configuration_goes_with_no_method(tmp_path):
    """Its settings, all of them, would take the place of the method's."""
    words = ["STUDENT.NAME", "resnet8", "DATA.NAME", "digits"]
    saved = tmp_path / "config.yaml"
    saved.write_text(load_config(None, words, "ce").dump())
    assert load_config(saved).DISTILL.METHODS == ["CE"]
    with pytest.raises(ConfigError, match="is the saved configuration of a run"):
        load_config(saved, [], "rcka_uncentered")


@pytest.fixture
def precedence(tmp_path):
    """A configuration file with a method beside it that both set some keys."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "mine.yaml").write_text(
        "DISTILL: {METHODS: [CE, KD], WARMUP: 0.1, KD: {WEIGHT: 2, TEMPERATURE: 2}}"
    )
    text = "DISTILL: {METHODS: [DIST], KD: {TEMPERATURE: 3}, CE: {WEIGHT: 3}}\n"
    return write(tmp_path, text)


def test_a_method_yields_to_the_file_and_the_file_to_the_command_line(precedence):
    cfg = load_config(precedence, ["DISTILL.CE.WEIGHT", "4"], "mine").DISTILL
    assert (cfg.WARMUP, cfg.KD.WEIGHT) == (0.1, 2)  # the method's, against the defaults
    assert cfg.KD.TEMPERATURE == 3  # the file's, against the method's
    assert cfg.CE.WEIGHT == 4  # the command line's, against the file's


def test_the_method_says_which_losses_are_summed_whatever_the_file_says(precedence):
    assert load_config(precedence).DISTILL.METHODS == ["DIST"]
    assert load_config(precedence, method="mine").DISTILL.METHODS == ["CE", "KD"]
    overrides = ["DISTILL.METHODS", "[CE]"]
    assert load_config(precedence, overrides, "mine").DISTILL.METHODS == ["CE"]


def test_a_method_beside_the_file_comes_before_the_general_one(precedence):
    general = method_files()
    assert "mine" not in general
    own = precedence.parent / "methods" / "kd.yaml"
    own.write_text("DISTILL: {METHODS: [KD]}")
    assert method_files(precedence) == {**general, "kd": own, "mine": own.with_stem("mine")}
    assert method_file("kd", precedence) == own
    assert method_file("kd") == CONFIGS / "methods" / "kd.yaml"
    assert load_config(precedence, method="kd").DISTILL.METHODS == ["KD"]
    cfg = load_config(None, ["STUDENT.NAME", "resnet8", "DATA.NAME", "digits"], "kd")
    assert cfg.DISTILL.METHODS == ["CE", "KD"]


def test_an_unknown_method_is_refused_with_near_matches(precedence):
    with pytest.raises(ConfigError, match=r"unknown method 'rkca'; near matches: .*rcka"):
        load_config(precedence, method="rkca")
    with pytest.raises(ConfigError, match=r"unknown method 'zzz'; known: .*at, .*, mine"):
        load_config(precedence, method="zzz")


def test_what_a_method_file_may_not_say_names_the_file(precedence):
    wrong = precedence.parent / "methods" / "wrong.yaml"
    wrong.write_text("DISTILL: {KD: {TAU: 4}}")
    with pytest.raises(ConfigError, match=rf"^{wrong}: unknown key 'DISTILL.KD.TAU'"):
        load_config(precedence, method="wrong")


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER: {EPOCHS: 3}\nSOLVER: {BATCH_SIZE: 5}\n", "SOLVER is already set on line 3"),
        ("SOLVER: {EPOCHS: 3, EPOCHS: 4}\n", "EPOCHS is already set on line 3; merge the"),
        ("SOLVER: &a {EPOCHS: 3, GAMMA: *a}\n", "a section contains itself, via an alias"),
        ("LOG_EVERY: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("_BASE_: {a: b}\n", "_BASE_: expected a file or a list of files"),
        ("_BASE_: nowhere.yaml\n", "nowhere.yaml: no such file or directory"),
        ("_BASE_: run.yaml\n", "is its own _BASE_"),
    ],
)
def test_a_file_that_says_something_else_than_it_seems_to_is_refused(tmp_path, text, message):
    refused = refusal(write(tmp_path, text))
    assert message in refused and str(tmp_path) in refused


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_of_another_encoding_is_named(tmp_path, encoding):
    path = tmp_path / "run.yaml"
    path.write_bytes("OUTPUT_DIR: größer\n".encode(encoding))
    assert f"{path}: cannot be read as UTF-8 text" in refusal(path)


def test_a_folder_in_a_files_place_is_refused(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path}: is a directory"


def test_a_key_twice_in_a_base_names_the_base(tmp_path):
    base = write(tmp_path, "SEED: 1\nSEED: 2\n", "base.yaml")
    child = tmp_path / "child.yaml"
    child.write_text("_BASE_: base.yaml\nSEED: 4\n")
    assert f"{base}: cannot be read as YAML: SEED is already set on line" in refusal(child)


def test_of_several_bases_the_later_one_wins_key_by_key(tmp_path):
    write(tmp_path, "SOLVER: {EPOCHS: 3, BATCH_SIZE: 5}\n", "one.yaml")
    write(tmp_path, "SOLVER: {EPOCHS: 4}\n", "two.yaml")
    child = tmp_path / "child.yaml"
    child.write_text("_BASE_: [one.yaml, two.yaml]\nSOLVER: {GAMMA: 0.5}\n")
    solver = load_config(child).SOLVER
    assert (solver.EPOCHS, solver.BATCH_SIZE, solver.GAMMA) == (4, 5, 0.5)


def test_a_missing_file_is_refused(tmp_path):
    assert "no.yaml: no such file or directory" in refusal(tmp_path / "no.yaml")


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
        ("DISTILL.PCKA.PATCH_SIZES", "[[4, 8]]", [[4, 8]]),
        ("DISTILL.PCKA.PATCH_SIZES", "[4]", [4]),
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
        (["SEED"], "expected pairs of KEY VALUE, got 'SEED'"),
        (["SEED", "1.5"], "SEED expects a int .default 0., got 1.5"),
        (["DATA.FLIP", "1"], "DATA.FLIP expects a bool"),
        (["SOLVER.EPOCHS", "0"], "SOLVER.EPOCHS: expected at least 1, got 0"),
        (["SOLVER.SCHEDULE", "step"], "SOLVER.SCHEDULE: expected one of multistep, cosine, one"),
        (["AUTOCAST", "float16"], "AUTOCAST: expected one of"),
        (["STUDENT.PIXEL_STD", "[0.2]"], "STUDENT.PIXEL_STD: expected three numbers"),
        (["STUDENT.NAME", ""], "STUDENT.NAME: expected the name of a model"),
        (["DISTILL.METHODS", "[]"], "DISTILL.METHODS: expected one or more"),
        (["DISTILL.METHODS", "[CE, CE]"], "DISTILL.METHODS: expected each loss once"),
        (["SOLVER.MILESTONES", "[[1, 2]]"], "SOLVER.MILESTONES expects a int"),
        (["DISTILL.PCKA.PATCH_SIZES", "[[4, 0.5]]"], "PATCH_SIZES expects a int .* got 0.5"),
        (["DISTILL.WARMUP", "-0.1"], "DISTILL.WARMUP: expected at least 0, got -0.1"),
        (["TEACHER.ACCURACY", "-1"], "TEACHER.ACCURACY: expected at least 0"),
        (["SOLVER.BASE_LR", ".nan"], "SOLVER.BASE_LR: expected a finite number, got nan"),
        (["SOLVER.WARMUP_EPOCHS", ".nan"], "SOLVER.WARMUP_EPOCHS: expected a finite number"),
        (["DISTILL.METHODS", "[KD]", "DISTILL.RELATIVE", "True"], "DISTILL.RELATIVE: needs CE"),
        (["DISTILL.WARMUP", ".nan"], "DISTILL.WARMUP: expected a finite number"),
        (["DATA.MEMORY_GB", ".nan"], "DATA.MEMORY_GB: expected a finite number"),
        (["TEACHER.ACCURACY", ".nan"], "TEACHER.ACCURACY: expected a finite number"),
        (["STUDENT.PIXEL_MEAN", "[0.1, .nan, 0.1]"], "STUDENT.PIXEL_MEAN: expected a finite"),
        (["DISTILL.FCKA.WEIGHTS", "[.inf]"], "DISTILL.FCKA.WEIGHTS: expected a finite number"),
        (["SEED", str(2**64)], "SEED: expected at most 18446744073709551615"),
        (["TEACHER.SEED", str(2**64)], "TEACHER.SEED: expected at most 18446744073709551615"),
        (["DATA.SPLIT_SEED", str(2**32)], "DATA.SPLIT_SEED: expected at most 4294967295"),
        (["SOLVER.BASE_LR", "-0.1"], "SOLVER.BASE_LR: expected at least 0, got -0.1"),
        (["SOLVER.MOMENTUM", "-1"], "SOLVER.MOMENTUM: expected at least 0"),
        (["SOLVER.WEIGHT_DECAY", "-1"], "SOLVER.WEIGHT_DECAY: expected at least 0"),
        (["SOLVER.MILESTONES", "[-1, 5]"], "SOLVER.MILESTONES: expected epochs, at least 1"),
        (
            ["SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0"],
            "SOLVER.NESTEROV: needs a SOLVER.MOMENTUM above 0",
        ),
        (["SOLVER.OPTIMIZER", "adam"], "SOLVER.OPTIMIZER: expected one of sgd, adamw"),
        (["SOLVER.ACCUMULATE", "0"], "SOLVER.ACCUMULATE: expected at least 1"),
        (["SOLVER.CLIP_GRADIENTS", "-1"], "SOLVER.CLIP_GRADIENTS: expected at least 0"),
        (["SOLVER.BETAS", "[0.9]"], "SOLVER.BETAS: expected two numbers"),
        (["SOLVER.BETAS", "[0.9, 1.0]"], "SOLVER.BETAS: expected two numbers from 0 to below 1"),
        (["SOLVER.EMA_DECAY", "1"], "SOLVER.EMA_DECAY: with 1 nothing is averaged"),
        (["SOLVER.ONECYCLE_RISE", "1.5"], "SOLVER.ONECYCLE_RISE: expected at most 1"),
        (
            ["SOLVER.SCHEDULE", "cosine", "SOLVER.MIN_LR", "1"],
            "SOLVER.MIN_LR: expected at most SOLVER.BASE_LR 0.05, got 1.0",
        ),
        (
            ["SOLVER.SCHEDULE", "onecycle", "SOLVER.WARMUP_EPOCHS", "2"],
            "SOLVER.WARMUP_EPOCHS: onecycle rises by itself, .* expected 0, got 2.0",
        ),
        (["DATA.CROP_PADDING", "1000000"], "DATA.CROP_PADDING: expected at most 128, four times"),
        (["DATA.RANDAUGMENT", "[2]"], r"DATA.RANDAUGMENT: expected \[operations, magnitude\]"),
        (["DATA.RANDAUGMENT", "[2, 31]"], r"or \[\] for none, got \[2, 31\]"),
        (["DATA.RANDAUGMENT", "[0, 9]"], "DATA.RANDAUGMENT: .* at least 1"),
        (["DATA.RANDAUGMENT", "[2, 9.5]"], "DATA.RANDAUGMENT"),
        (["DATA.ERASING", "1.5"], "DATA.ERASING: expected at most 1"),
        (["DATA.MIXUP", "-1"], "DATA.MIXUP: expected at least 0"),
        (["DATA.CUTMIX", ".inf"], "DATA.CUTMIX: expected a finite number"),
        (["TEACHER.ACCURACY", "101"], "TEACHER.ACCURACY: expected at most 100"),
        (["OUTPUT_DIR", ""], "OUTPUT_DIR: expected the path of a folder"),
        (["DISTILL.INHERIT", "[1]"], r"DISTILL.INHERIT: expected prefixes .* such as \['fc.'\]"),
        (["DISTILL.METHODS", "[CE, RKCA]"], "unknown loss 'RKCA'; near matches: .*RCKA"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, ""), overrides)


def test_values_at_the_edge_are_taken(tmp_path):
    words = ["SEED", str(2**64 - 1), "DATA.SPLIT_SEED", str(2**32 - 1), "DATA.MEMORY_GB", ".inf"]
    cfg = load_config(write(tmp_path, ""), [*words, "SOLVER.BASE_LR", "0"])
    assert (2**64 - 1, float("inf")) == (cfg.SEED, cfg.DATA.MEMORY_GB)


def test_a_saved_configuration_is_read_back(tiny_config):
    cfg = tiny_config("rcka")
    assert config_from_text(cfg.dump()) == cfg


def test_a_saved_configuration_with_the_sections_of_all_losses_goes_on(tiny_config):
    """Checkpoints of finished trainings hold such ones."""
    text = Path(__file__).with_name("config_with_all_sections.yaml").read_text()
    keys = {"SOLVER.SCHEDULE": "multistep", "TEACHER.WEIGHTS": "resnet8.pth", "TEACHER.EPOCHS": 30}
    assert changed_keys(config_from_text(text), tiny_config("kd_fcka", **keys)) == []
    assert changed_keys(config_from_text(text), tiny_config("kd", **keys)) == ["DISTILL.METHODS"]
    of_stage = {"DISTILL.FCKA.WEIGHTS": "[3, 3, 3]"}
    assert changed_keys(config_from_text(text), tiny_config("kd_fcka", **keys, **of_stage)) == []


def test_changed_keys_leave_out_the_harmless_ones(tiny_config):
    old = tiny_config()
    new = tiny_config(name="elsewhere", LOG_EVERY=3, **{"DATA.ROOT": "x", "SOLVER.MOMENTUM": 0.5})
    assert changed_keys(old, new) == ["SOLVER.MOMENTUM"]


@pytest.mark.parametrize(
    ("schedule", "refused"), [("cosine", True), ("onecycle", True), ("multistep", False)]
)
def test_more_epochs_continue_only_a_schedule_that_they_leave_alone(tiny_config, schedule, refused):
    keys = {"SOLVER.SCHEDULE": schedule, "SOLVER.WARMUP_EPOCHS": 0}
    old, new = (tiny_config(**keys, **{"SOLVER.EPOCHS": epochs}) for epochs in (2, 4))
    assert changed_keys(old, new) == (["SOLVER.EPOCHS"] if refused else [])


def test_more_epochs_would_change_a_warm_up_of_the_distillation(tiny_config):
    keys = {"SOLVER.SCHEDULE": "multistep", "DISTILL.WARMUP": 0.5}
    old, new = (tiny_config(**keys, **{"SOLVER.EPOCHS": epochs}) for epochs in (2, 4))
    assert changed_keys(old, new) == ["SOLVER.EPOCHS"]


@pytest.mark.parametrize(
    ("method", "steps", "told"),
    [
        ("rcka", 46_859, ["DISTILL.RCKA: weights of 40 with 1 for cross-entropy"]),
        ("rcka", 46_860, []),
        ("kd_rcka", 46_859, ["DISTILL.RCKA: weights of 40 with 0.1 for"]),
        ("rcka_short", 100, []),
        ("kd_fcka", 100, []),
    ],
)
def test_rcka_in_a_training_far_shorter_than_the_papers_is_told(tiny_config, method, steps, told):
    keys = {"SOLVER.SCHEDULE": "cosine"}
    found = list(doubts(tiny_config(method, **keys), steps))
    assert [doubt[: len(start)] for doubt, start in zip(found, told, strict=True)] == told
    assert all("dist_fitnet_fcka" in doubt and f"in {steps:,} " in doubt for doubt in found)


@pytest.mark.parametrize(
    ("optimizer", "rate", "told"),
    [("adamw", 0.05, True), ("adamw", 0.01, False), ("sgd", 1, False)],
)
def test_a_rate_for_sgd_is_told_where_adamw_is_to_take_it(tiny_config, optimizer, rate, told):
    keys = {"SOLVER.OPTIMIZER": optimizer, "SOLVER.BASE_LR": rate, "SOLVER.SCHEDULE": "cosine"}
    found = list(doubts(tiny_config(**keys), 100))
    assert [doubt.partition(":")[0] for doubt in found] == ["SOLVER.BASE_LR"] * told


@pytest.mark.parametrize(
    ("key", "value", "more"),
    [
        ("SOLVER.NESTEROV", True, {"SOLVER.OPTIMIZER": "adamw", "SOLVER.BASE_LR": 0.001}),
        ("SOLVER.MIN_LR", 0.001, {"SOLVER.SCHEDULE": "onecycle", "SOLVER.WARMUP_EPOCHS": 0.0}),
        ("DISTILL.WARMUP", 0.5, {}),
        ("DISTILL.RELATIVE", True, {}),
        ("DISTILL.DOT_DELTA", 0.05, {}),
    ],
)
def test_a_setting_without_effect_is_told(tiny_config, key, value, more):
    keys = {"SOLVER.SCHEDULE": "cosine", **more}
    assert list(doubts(tiny_config("ce", **keys), 100)) == []
    (told,) = doubts(tiny_config("ce", **keys, **{key: value}), 100)
    assert told.startswith(f"{key}: has no effect here; it is ")
    if key.startswith("DISTILL"):
        assert list(doubts(tiny_config("kd", **keys, **{key: value}), 100)) == []


def test_a_tap_that_no_loss_reads_is_told(tiny_config):
    taps = {"DISTILL.TAPS": "[[mine, layer1, layer1], [stage4, layer2, layer2]]"}
    (told,) = doubts(tiny_config("fcka", **taps), 100)
    assert told.startswith("DISTILL.TAPS: no loss reads mine; name it in the STAGES of one")
    assert not list(doubts(tiny_config("fcka", **taps, **{"DISTILL.FCKA.STAGES": "[mine]"}), 100))


@pytest.mark.parametrize("text", ["{size: 32, drop: [0.1, a]}", "{'size': 32, 'drop': [0.1, 'a']}"])
def test_keywords_of_a_model_are_any_mapping_in_a_file_and_on_the_command_line(tmp_path, text):
    path = write(tmp_path, f"TEACHER: {{KWARGS: {text}}}\n")
    for cfg in (load_config(path), load_config(write(tmp_path, ""), ["TEACHER.KWARGS", text])):
        assert cfg.TEACHER.KWARGS == {"size": 32, "drop": [0.1, "a"]}
        assert cfg.STUDENT.KWARGS == {}
        again = config_from_text(cfg.dump())
        assert again.TEACHER.KWARGS == cfg.TEACHER.KWARGS
        assert changed_keys(again, cfg) == []
        assert changed_keys(load_config(write(tmp_path, "")), cfg) == ["TEACHER.KWARGS"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "STUDENT.KWARGS expects a mapping"),
        ("wide", "STUDENT.KWARGS expects a mapping"),
        ("{1: 2}", "STUDENT.KWARGS expects names as keys, got 1"),
    ],
)
def test_keywords_that_are_no_mapping_are_refused(tmp_path, text, message):
    assert message in refusal(write(tmp_path, ""), ["STUDENT.KWARGS", text])
