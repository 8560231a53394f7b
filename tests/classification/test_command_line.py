from __future__ import annotations

import logging

import pytest

from classification import compare, evaluate, export, train
from classification.command_line import catalog, config_arguments, console_log
from classification.config import CONFIGS, load_config, method_files
from classification.run_files import RunFiles


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
        if "methods" not in path.parts and path.stem != "base"
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
    with RunFiles(tmp_path / "kd", resume=False) as run, console_log():
        run.logger.info("epoch %d", 1)
        logging.getLogger("classification").info("of all")
    assert capsys.readouterr().err == f"epoch 1  ({tmp_path / 'kd'})\nof all\n"
    assert " epoch 1\n" in (tmp_path / "kd" / "log.txt").read_text()
