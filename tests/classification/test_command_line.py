from __future__ import annotations

import logging
from unittest.mock import Mock

import pytest

from classification import compare, evaluate, export, train
from classification.config import CONFIGS, catalog, config_arguments, load_config, method_files
from pcka.engine.command import TrainingFailedError, run_command
from pcka.engine.config import ConfigError
from pcka.engine.folder_lock import FolderInUseError
from pcka.engine.progress import console_log
from pcka.engine.run_folder import RunFolder
from pcka.files import CheckpointError


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


def test_a_configuration_file_has_to_be_named(capsys):
    with pytest.raises(SystemExit):
        train.main(["--method", "kd"])
    assert "--config-file" in capsys.readouterr().err


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
        (ImportError("pip install 'pcka[export]'"), "error: pip install 'pcka[export]'\n"),
    ],
)
def test_what_the_user_can_mend_is_told_in_one_line(capsys, error, told):
    with pytest.raises(SystemExit) as end:
        run_command(Mock(side_effect=error))
    assert end.value.code == 1
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError("a defect"), ImportError("x")])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error), match=str(error)):
        run_command(Mock(side_effect=error))


def test_a_command_that_went_well_ends_with_0():
    with pytest.raises(SystemExit) as end:
        run_command(lambda: {"top1": 50.0})
    assert end.value.code == 0


def test_keys_among_the_methods_are_told_where_they_belong(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--config-file", "F", "--methods", "ce", "SOLVER.EPOCHS", "1"])
    assert "SOLVER.EPOCHS is no method; KEY VALUE pairs come last, behind a --" in (
        capsys.readouterr().err
    )


def test_a_comparison_whose_runs_all_failed_is_an_error(monkeypatch, digits_config, capsys):
    comparison = compare.new_comparison(load_config(digits_config), ["ce"])
    comparison.add("ce", 0, TrainingFailedError("epoch 1 is not finite"))
    monkeypatch.setattr(compare, "compare", lambda *_, **__: comparison)
    words = ["--config-file", str(digits_config), "--methods", "ce"]
    with pytest.raises(TrainingFailedError, match="no run came to a result"):
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
    assert last == "interrupted: the same command with --resume goes on after the last epoch"
    assert "Traceback" not in program.log.read_text()


@pytest.mark.slow
def test_a_mistake_is_told_without_a_traceback(start, digits_config):
    program = start("classification/train.py", "--config-file", digits_config, "SOLVER.EPOCH", 3)
    assert program.wait() == 1
    (line,) = program.log.read_text().splitlines()
    assert line.startswith("error: the command line: unknown key 'SOLVER.EPOCH'; near matches:")
