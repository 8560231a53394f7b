"""Which trainer a configuration file is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcka.engine.config import ConfigError
from pcka.engine.trainers import trainer_of

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("trainer", ["classification", "detection"])
def test_every_file_of_this_project_is_for_the_trainer_of_its_folder(trainer):
    files = [p for p in (CONFIGS / trainer).rglob("*.yaml") if p.parent.name != "methods"]
    assert len(files) > 5
    assert {trainer_of(file) for file in files} == {trainer}


@pytest.mark.parametrize(
    ("content", "keys", "expected"),
    [
        ("STUDENT: {NAME: resnet8}", [], "classification"),
        ("MODEL: {META_ARCHITECTURE: RetinaNet}", [], "detection"),
        ("SOLVER: {MAX_ITER: 3}\n_BASE_: base.yaml", [], "detection"),
        ("SOLVER: {EPOCHS: 3}\n_BASE_: [none.yaml, other.yaml]", [], "classification"),
        ("SOLVER: {EPOCHS: 3}", ["STUDENT.NAME", "resnet8"], "classification"),
        ("MODEL: !!python/object/apply:os.getcwd []", [], "detection"),  # it is not made
        ("MODEL: {}\nMODEL: {}", [], "detection"),
    ],
)
def test_sections_tell_those_of_bases_and_of_the_command_line_too(
    tmp_path, content, keys, expected
):
    (tmp_path / "base.yaml").write_text("_BASE_: base.yaml\nDATASETS: {TRAIN: [x]}")
    (tmp_path / "other.yaml").write_text("DATA: {NAME: digits}")
    (tmp_path / "a.yaml").write_text(content)
    assert trainer_of(tmp_path / "a.yaml", keys) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("SEED: 0", "is not a training configuration: a classifier's has sections such as DATA"),
        ("[1, 2]", "is not a training configuration"),
        ("_BASE_: a.yaml", "is not a training configuration"),
        ("MODEL: {}\nSTUDENT: {}", r"sections of both \(STUDENT and MODEL\); remove those"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_what_is_neither_or_both_is_refused(tmp_path, content, message):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        trainer_of(tmp_path / "a.yaml")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml: no such file or directory$"):
        trainer_of(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match=f"{tmp_path}: is a directory$"):
        trainer_of(tmp_path)
