from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from classification import evaluate
from classification.demo import run_demo

ROOT = Path(__file__).parents[2]


def test_an_evaluation_without_weights_says_what_to_give(digits_configs, tiny_overrides):
    keys = ["--config-file", str(digits_configs / "ce.yaml"), *tiny_overrides()]
    with pytest.raises(ValueError, match=r"STUDENT: expected a model .* give --weights"):
        evaluate.main(keys)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "demo.py"])
def test_the_scripts_run_from_the_root(script):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, f"classification/{script}", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
    )


def test_the_demo_compares_all_methods_and_reuses_what_is_done(tiny_overrides, tmp_path):
    overrides = tiny_overrides(**{"SOLVER.EPOCHS": 1})
    table = run_demo(tmp_path / "demo", overrides)
    assert (tmp_path / "demo" / "results.md").read_text() == table
    for name in ("teacher (resnet8)", "CE", "KD", "RCKA", "KD + FCKA"):
        assert f"| {name} |" in table
    assert (tmp_path / "demo" / "comparison.png").stat().st_size > 0
    trained = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("checkpoint.pth")
    }
    assert len(trained) == 5
    assert run_demo(tmp_path / "demo", overrides) == table
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
