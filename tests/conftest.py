from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASKED = """
import runpy, sys
script, *unwanted = sys.argv[1:]
sys.argv = [script, '--help']
try:
    runpy.run_path(script, run_name='__main__')
except SystemExit as end:
    sys.exit(end.code or ','.join({*unwanted} & sys.modules.keys()) or 0)
sys.exit('it went on')
"""


def pytest_configure() -> None:
    # A job in a shell's background ignores Ctrl-C, and so would all processes that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def answered():
    """``answered(script, *libraries)``: what ``--help`` says, without importing the libraries."""

    def ask(script: str, *libraries: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-c", ASKED, script, *libraries],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return ask
