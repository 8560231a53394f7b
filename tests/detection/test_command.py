"""How the commands end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser

from detection import compare
from detection.arguments import PARSERS, train_parser
from detection.checkpoint import WeightsError
from detection.config import PROJECT, detection_config, section_defaults
from detection.data.mapper import UnusableImageError
from detection.help_keys import all_keys
from pcka import losses
from pcka.engine.command import TrainingFailedError, run_command
from pcka.engine.config import ConfigError, flatten
from pcka.engine.folder_lock import FolderInUseError
from pcka.engine.help_keys import commented_keys, loss_keys

ERRORS = [ConfigError, WeightsError, FolderInUseError, UnusableImageError, TrainingFailedError]


@pytest.mark.parametrize("error", ERRORS)
def test_what_the_user_can_mend_is_told_in_one_line(capsys, error):
    with pytest.raises(SystemExit) as end:
        run_command(Mock(side_effect=error("KEY: no\nmore")))
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: KEY: no more\n"


def test_a_full_disk_is_told_in_one_line(capsys):
    with pytest.raises(SystemExit):
        run_command(Mock(side_effect=OSError(28, "No space left", "run/x.pth")))
    assert capsys.readouterr().err == "error: [Errno 28] No space left: 'run/x.pth'\n"


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError("a defect")])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a defect"):
        run_command(Mock(side_effect=error))


def test_a_command_that_went_well_ends_with_0():
    with pytest.raises(SystemExit) as end:
        run_command(lambda: {"bbox": 1})
    assert end.value.code == 0


@pytest.mark.parametrize("command", PARSERS)
def test_help_waits_for_no_library(command, answered):
    """What takes seconds to import is not imported."""
    text = answered(f"detection/{command}.py", "torch", "detectron2")
    assert ("--debug" in text and "(default: " in text) or command in ("doctor", "export")


def test_train_takes_the_options_of_detectron2s_own_scripts():
    theirs = default_argument_parser().parse_args([])
    ours = train_parser().parse_args([])
    assert vars(ours) == {**vars(theirs), "debug": False}
    given = train_parser().parse_intermixed_args(
        ["--config-file", "F", "SEED", "1", "--resume", "--num-gpus", "2", "OUTPUT_DIR", "x"]
    )
    assert given.opts == ["SEED", "1", "OUTPUT_DIR", "x"]
    assert (given.resume, given.num_gpus, given.config_file) == (True, 2, "F")


def test_every_key_of_this_project_is_explained():
    texts, known = commented_keys(detection_config), flatten(get_cfg())
    own = [key for key in flatten(detection_config()) if key not in known]
    assert sorted(texts) == sorted(own)
    for key in own:
        assert texts[key], f"{key}: say what it is by a comment behind its default"
    text = all_keys()
    for name in losses.names():
        for key in loss_keys(name, section_defaults):
            assert key.text and f"  {key.name} " in text


def test_keys_may_stand_among_the_lists_of_a_comparison(monkeypatch):
    given = {}
    monkeypatch.setattr(compare, "compare", lambda *values, **_: given.setdefault("it", values))
    with pytest.raises(AttributeError):  # there is no comparison to print
        compare.main(["--config-files", "a.yaml", "SOLVER.MAX_ITER", "2", "--seeds", "0"])
    assert given["it"][0] == [Path("a.yaml")]
    assert given["it"][1] == [0] and given["it"][3] == ["SOLVER.MAX_ITER", "2"]


@pytest.mark.slow
def test_ctrl_c_is_answered_with_the_way_on(tmp_path, arguments):
    script = str(PROJECT / "detection" / "train_net.py")
    command = [sys.executable, "-W", "ignore", script, *arguments(tmp_path / "run", 100_000)]
    with (tmp_path / "told").open("w") as told:
        program = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=told)
        while program.poll() is None and not (tmp_path / "run" / "last_checkpoint").exists():
            time.sleep(0.1)
        program.send_signal(signal.SIGINT)
        assert program.wait() == 130
    text = (tmp_path / "told").read_text()
    assert "Traceback" not in text
    assert text.splitlines()[-1] == (
        "interrupted: repeat the command with --resume to continue after the last checkpoint"
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_net", "compare", "export"])
def test_a_mistake_is_told_without_a_traceback(tmp_path, script):
    (tmp_path / "bad.yaml").write_text("VERSION: 2\nSOLVER: {EPOCH: 3}\n")
    flag = "--config-files" if script == "compare" else "--config-file"
    more = ["--weights", "w", "--output", "o"] if script == "export" else []
    words = [str(PROJECT / "detection" / f"{script}.py"), flag, str(tmp_path / "bad.yaml"), *more]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "bad.yaml: Non-existent config key: SOLVER.EPOCH" in line
