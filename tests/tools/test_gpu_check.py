"""The whole check, rehearsed on a CPU with the software of a GPU machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import gpu_check
from tools.gpu.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("PCKA_GPU_PYTHON")  # such a machine's: Python 3.12, torch 2.11


def test_stages_that_there_are_not_and_bundles_that_are_none_are_refused(tmp_path, capsys):
    for words, message in (
        (["--only", "nothing"], "unknown stage 'nothing'; available: environment"),
        (["--bundle", str(tmp_path)], "run make gpu-bundle"),
    ):
        with pytest.raises(SystemExit) as ended:
            gpu_check.main(["--out", str(tmp_path / "out"), *words])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_the_operators_it_ends_with_3_at_once(tmp_path, capfd):
    assert gpu_check.main(["--out", str(tmp_path), "--only", "ncu"]) == 3
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: s["status"] for name, s in results["stages"].items()} == {"environment": "failed"}
    assert "[environment] not in use: " in capfd.readouterr().out
    assert "| environment | failed |" in (tmp_path / "report.md").read_text()


NOT_COMPILED = """
import ctypes
import torch

def no_library(path, *rest, **more):
    raise OSError(path)

ctypes.CDLL = no_library
import pcka
"""


def test_no_stage_runs_on_the_reference_instead(tmp_path, monkeypatch):
    (tmp_path / "not_compiled.py").write_text(NOT_COMPILED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "choose", lambda *_: [Stage("it", "not_compiled", 60)])
    assert gpu_check.main(["--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "PCKA_REQUIRE=cpu: the compiled operators are not in use on cpu" in log


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="PCKA_GPU_PYTHON names no Python of a GPU machine")
def test_the_rehearsal_passes_from_a_bare_copy_and_a_bundle(tmp_path):
    """Wheels and libraries packed here, a copy of the tracked files, and that Python: no more."""
    assert PYTHON is not None
    bundle, copy = tmp_path / "bundle", tmp_path / "copy"
    pack = [sys.executable, "tools/gpu_bundle.py", "--no-build", "--out", str(bundle)]
    subprocess.run(pack, cwd=ROOT, check=True)
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    out = tmp_path / "out"
    check = [PYTHON, "tools/gpu_check.py", "--out", str(out), "--bundle", str(bundle)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [*check, "--device", "cpu", "--quick"],
        cwd=copy,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert len(result.stdout.splitlines()) < 120
    assert "| p3_rows_bfloat16_2 |" in (out / "report.md").read_text()
    assert len(list(out.iterdir())) <= 8
