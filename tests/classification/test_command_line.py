from __future__ import annotations

import logging
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from classification import compare, evaluate, export, train
from classification.arguments import PARSERS, config_arguments
from classification.catalog import CONFIGS, catalog, method_files
from classification.config import default_config, load_config
from classification.help_keys import all_keys
from pcka import losses
from pcka.engine.command import TrainingFailedError, run_command
from pcka.engine.config import ConfigError, flatten
from pcka.engine.folder_lock import FolderInUseError
from pcka.engine.help_keys import commented_keys, loss_keys
from pcka.engine.progress import console_log
from pcka.engine.run_folder import RunFolder
from pcka.files import CheckpointError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", [train, compare, evaluate, export])
def test_list_prints_configurations_and_methods_and_needs_nothing_else(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--list"])
    assert end.value.code in (0, None)
    assert capsys.readouterr().out == catalog() + "\n"


def test_the_catalog_has_every_configuration_that_can_be_run():
    lines = catalog().splitlines()
    listed = [line.strip() for line in lines if line.strip().startswith("configs/")]
    root = CONFIGS.parents[1]
    assert "configs/classification/cifar100/resnet110_resnet20.yaml" in listed
    for name in listed:
        assert load_config(root / name).STUDENT.NAME
    others = {
        str(path.relative_to(root))
        for path in CONFIGS.rglob("*.yaml")
        if path.parent != CONFIGS and "methods" not in path.parts and path.stem != "base"
    }
    assert set(listed) == others


def test_the_catalog_has_every_method_with_what_it_is():
    lines = catalog().splitlines()
    described = dict(
        line.split(maxsplit=1)
        for line in lines[lines.index("Methods (--method M, on any of them):") + 1 :]
    )
    assert described.keys() == method_files().keys()
    assert described["ce"] == "Cross-entropy alone: what the student learns by itself."
    assert all(len(text) > 10 and not text.startswith("#") for text in described.values())


def test_overrides_may_stand_before_and_after_the_options():
    parser = config_arguments("")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_intermixed_args(
        ["SEED", "1", "--config-file", "F", "LOG_EVERY", "2", "--resume", "DEVICE", "cpu"]
    )
    assert (given.config_file, given.resume) == ("F", True)
    assert given.overrides == ["SEED", "1", "LOG_EVERY", "2", "DEVICE", "cpu"]


def test_a_configuration_file_has_to_be_named():
    with pytest.raises(ConfigError, match="--config-file"):
        train.main(["--method", "kd"])


def test_train_takes_the_method_of_the_command_line(digits_config, monkeypatch):
    monkeypatch.setattr(train, "run_experiment", lambda cfg, resume: (cfg, resume))
    words = ["--config-file", str(digits_config), "SEED", "4"]
    cfg, resume = train.main(words)
    assert (cfg.DISTILL.METHODS, cfg.SEED, resume) == (["CE"], 4, False)
    cfg, resume = train.main([*words, "--method", "rcka", "--resume"])
    assert (cfg.DISTILL.METHODS, cfg.SEED, resume) == (["CE", "RCKA"], 4, True)


def test_a_line_of_a_run_names_its_folder_on_the_console_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with RunFolder(tmp_path / "kd", resume=False) as run, console_log():
        run.logger.info("epoch %d", 1)
        logging.getLogger("pcka").info("of all")
    assert capsys.readouterr().err == f"epoch 1  ({tmp_path / 'kd'})\nof all\n"
    assert " epoch 1\n" in (tmp_path / "kd" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConfigError("SEED: no"), "error: SEED: no\n"),
        (CheckpointError("path: no"), "error: path: no\n"),
        (FolderInUseError("OUTPUT_DIR: no"), "error: OUTPUT_DIR: no\n"),
        (TrainingFailedError("epoch 1 is not finite"), "error: epoch 1 is not finite\n"),
        (
            OSError(28, "No space left", "run/x.pth"),
            "error: [Errno 28] No space left: 'run/x.pth'\n",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "error: CUDA out of memory. What may help: a smaller batch or image, or fewer models "
            "side by side\n",
        ),
        (ImportError("pip install 'pcka[export]'"), "error: pip install 'pcka[export]'\n"),
    ],
)
def test_what_the_user_can_mend_is_told_in_one_line(capsys, error, told):
    with pytest.raises(SystemExit) as end:
        run_command(Mock(side_effect=error))
    assert end.value.code == 1
    assert capsys.readouterr().err == told


def test_debug_shows_where_an_error_came_from(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug"])
    with pytest.raises(ConfigError, match="SEED"):
        run_command(Mock(side_effect=ConfigError("SEED: no")))


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError("a defect"), ImportError("x")])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error), match=str(error)):
        run_command(Mock(side_effect=error))


def test_a_command_that_went_well_ends_with_0():
    with pytest.raises(SystemExit) as end:
        run_command(lambda: {"top1": 50.0})
    assert end.value.code == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--methods", "ce", "kd", "SOLVER.EPOCHS", "1", "SEED", "4", "--seeds", "0", "1"],
        ["SOLVER.EPOCHS", "1", "--methods", "ce", "kd", "--seeds", "0", "1", "SEED", "4"],
        ["--seeds", "0", "1", "--methods", "ce", "kd", "--", "SOLVER.EPOCHS", "1", "SEED", "4"],
    ],
)
def test_keys_may_stand_among_the_lists_of_a_comparison(monkeypatch, words):
    given = {}
    monkeypatch.setattr(compare, "compare", lambda *values, **_: given.setdefault("it", values))
    with pytest.raises(AttributeError):  # there is no comparison to print
        compare.main(["--config-file", "F", *words])
    _, methods, seeds, _, overrides = given["it"]
    assert (methods, seeds) == (["ce", "kd"], [0, 1])
    assert overrides == ["SOLVER.EPOCHS", "1", "SEED", "4"]


def test_a_comparison_takes_a_folder_and_two_names_too(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(
        compare, "pair_settings", lambda given, overrides: ({"DATA.ROOT": given.data}, "")
    )
    monkeypatch.setattr(compare, "compare", lambda *values, **_: given.setdefault("it", values))
    with pytest.raises(AttributeError):
        compare.main(["--data", "images", "--student", "resnet8", "--methods", "ce"])
    assert given["it"][0] == {"DATA.ROOT": "images"}


@pytest.mark.parametrize("command", PARSERS)
def test_help_has_what_there_is_and_how_it_is_typed(command):
    text = PARSERS[command]().format_help()
    assert "--debug" in text
    assert "for example:" in text or command == "demo"
    assert "(default: " in text or command == "export"  # which has none to tell


@pytest.mark.parametrize("command", PARSERS)
def test_help_waits_for_no_library(command, answered):
    """What takes seconds to import is not imported."""
    assert "usage:" in answered(f"classification/{command}.py", "torch", "matplotlib")


def test_every_key_and_every_keyword_of_a_loss_is_explained():
    text = all_keys()
    for key in flatten(default_config()):
        assert f"  {key} " in text
    for name in losses.names():
        for key in loss_keys(name):
            assert key.text, f"{key.name}: say what it is in the docstring of the loss"
            assert f"  {key.name} " in text


def test_keys_are_explained_by_the_comments_behind_their_defaults():
    texts = commented_keys(default_config)
    assert texts["SEED"] == "seed of initialisation, data order and augmentation"
    assert texts["DATA.IMAGE_SIZE"] == "side of the square images, pixels"
    for key in flatten(default_config()):
        assert texts[key], f"{key}: say what it is by a comment behind its default"
    assert texts.keys() == flatten(default_config()).keys()


def test_help_keys_prints_them_and_ends(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help-keys"])
    assert not end.value.code
    assert capsys.readouterr().out == all_keys() + "\n"


def test_a_comparison_whose_runs_all_failed_is_an_error(monkeypatch, digits_config, capsys):
    comparison = compare.new_comparison({"ce": load_config(digits_config)})
    comparison.add("ce", 0, TrainingFailedError("epoch 1 is not finite"))
    monkeypatch.setattr(compare, "compare", lambda *_, **__: comparison)
    words = ["--config-file", str(digits_config), "--methods", "ce"]
    with pytest.raises(TrainingFailedError, match="no run produced a result"):
        compare.main(words)
    assert "ce, seed 0: epoch 1 is not finite" in capsys.readouterr().out
    comparison.add("ce", 1, {"last_accuracy": 50.0, "best_accuracy": 50.0})
    assert compare.main(words) is comparison


@pytest.mark.slow
def test_ctrl_c_is_answered_with_the_way_on(start, digits_config, tiny_overrides, tmp_path):
    keys = tiny_overrides(**{"TEACHER.NAME": "", "SOLVER.EPOCHS": 100_000})
    program = start("classification/train.py", "--config-file", digits_config, *keys)
    program.interrupt_when((tmp_path / "run" / "checkpoint.pth").exists)
    assert program.wait() == 130
    last = program.log.read_text().splitlines()[-1]
    assert last == "interrupted: repeat the command with --resume to continue after the last epoch"
    assert "Traceback" not in program.log.read_text()


@pytest.mark.slow
def test_a_mistake_is_told_without_a_traceback(start, digits_config):
    program = start("classification/train.py", "--config-file", digits_config, "SOLVER.EPOCH", 3)
    assert program.wait() == 1
    (line,) = program.log.read_text().splitlines()
    assert line.startswith("error: the command line: unknown key 'SOLVER.EPOCH'; near matches:")
