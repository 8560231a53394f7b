"""How the commands end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest

from detection.checkpoint import WeightsError
from detection.config import PROJECT
from detection.data.mapper import UnusableImageError
from pcka.engine.command import TrainingFailedError, run_command
from pcka.engine.config import ConfigError
from pcka.engine.folder_lock import FolderInUseError

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
        "interrupted: the same command with --resume goes on after the last checkpoint"
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
