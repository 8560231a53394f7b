from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from classification import evaluate
from classification.demo import METHODS, run_demo

ROOT = Path(__file__).parents[2]


def test_an_evaluation_without_weights_says_what_to_give(digits_config, tiny_overrides):
    keys = ["--config-file", str(digits_config), *tiny_overrides()]
    with pytest.raises(ValueError, match=r"STUDENT: expected a model .* give --weights"):
        evaluate.main(keys)


@pytest.mark.parametrize("script", ["train", "evaluate", "compare", "export", "demo"])
def test_the_scripts_run_from_the_root(script):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, f"classification/{script}.py", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
    )


@pytest.mark.slow
def test_the_demo_compares_all_methods_and_reuses_what_is_done(tiny_overrides, tmp_path):
    demo, overrides = tmp_path / "demo", tiny_overrides("", **{"SOLVER.EPOCHS": 1})
    overrides += ["TEACHER.CACHE_DIR", str(demo / "teacher")]
    table = run_demo(demo, (0, 1), overrides)
    assert (demo / "comparison.md").read_text() == table
    assert table.startswith("resnet8 from resnet8 (")
    assert METHODS[0] == "ce"  # what the others are compared with
    for name in METHODS:
        assert f"|{name}|2|" in table.replace(" ", "")
    assert (demo / "comparison.png").stat().st_size > 0
    trained = {path: path.stat().st_mtime_ns for path in demo.rglob("checkpoint.pth")}
    assert len(trained) == len(METHODS) * 2 + 1  # and the teacher
    assert run_demo(demo, (0, 1), overrides) == table
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
