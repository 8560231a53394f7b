"""docs/extending.md does as it says: its files are written, its edits made, its commands run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import pcka
from pcka.engine.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
PARTS, OPERATOR = PAGE.split("\n## Operator\n")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NAMED_FILE = re.compile(r"`([\w/]+\.\w+)`")
SHORT = (
    "DEVICE cpu DATA.TRAIN_IMAGES 40 SOLVER.EPOCHS 1 TEACHER.EPOCHS 1 SOLVER.WARMUP_EPOCHS 0.5 "
    "SOLVER.BATCH_SIZE 20 TEACHER.CACHE_DIR teachers"
)


def blocks(text, *languages):
    """File -> content of the blocks in some languages; the paragraph before a block names it."""
    found = {}
    for block in BLOCK.finditer(text):
        if block[1] in languages:
            paragraph = text[: block.start()].rstrip().rpartition("\n\n")[2]
            found[NAMED_FILE.search(paragraph)[1]] = block[2]
    return found


def commands(text):
    """The lines of the shell blocks."""
    shell = "".join(block[2] for block in BLOCK.finditer(text) if block[1] == "sh")
    return shell.replace("\\\n", " ").splitlines()


def section(title):
    return re.search(rf"\n## {title}\n(.*?)(?=\n## |\Z)", PAGE, re.DOTALL)[1]


def run(command, folder, *more, **environment):
    """Run a command of the page, by this Python."""
    result = subprocess.run(
        f"{re.sub('^python', sys.executable, command)} {' '.join(more)}",
        shell=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]


def write(files, folder):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


# --- loss, model, data set, pair -----------------------------------------------------------------


@pytest.fixture
def clone(tmp_path):
    """The root of a clone, with the page's files and images for its data set."""
    for name in ("classification", "configs", "pcka"):
        (tmp_path / name).symlink_to(ROOT / name)
    write(blocks(PARTS, "python", "yaml"), tmp_path)
    digits = load_digits()
    grey = (digits.images * 255 / 16).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=3)
    for split, part in (("train", slice(0, 200)), ("test", slice(200, 400))):
        (tmp_path / "data" / "arrays").mkdir(parents=True, exist_ok=True)
        file = tmp_path / "data" / "arrays" / f"{split}.npz"
        np.savez(file, images=images[part], labels=digits.target[part])
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "folder", "term"),
    [
        ("Loss", "output/cosine", "loss_cosine_last"),
        ("Model", "output/plain", "loss_fcka_last"),
        ("Data set", "output/arrays", "loss_ce"),
    ],
)
def test_a_part_of_ones_own_is_trained_with(clone, title, folder, term):
    (command,) = commands(section(title))
    run(command, clone, SHORT)
    (record,) = read_metrics(clone / folder / "metrics.jsonl")
    assert record[term] > 0


@pytest.mark.slow
def test_a_pair_of_ones_own_is_compared(clone):
    (command,) = commands(section("Pair"))
    run(command, clone, "--", SHORT)
    table = (clone / "output" / "cosine_compared" / "comparison.md").read_text()
    assert all(re.search(rf"\| {method} +\|", table) for method in ("ce", "fcka", "cosine"))


def test_every_file_that_the_page_names_is_there():
    example = {"pcka/losses/cosine.py", "methods/cosine.yaml"}
    example |= {"tests/losses/test_cosine.py", "tests/classification/data/test_arrays.py"}
    example |= blocks(OPERATOR, "cpp", "python").keys()
    named = set(re.findall(r"`((?:\w+/)+\w+\.\w+)`", PAGE))
    assert len(named) > 20 and [n for n in named - example if not (ROOT / n).exists()] == []


# --- operator ------------------------------------------------------------------------------------


def edited(text, diff):
    """``text`` after a diff without line numbers: each hunk's old lines stand there once."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        assert text.count(old) == 1, f"not once: {old}"
        text = text.replace(old, "".join(line[1:] for line in lines if line[0] in " +"))
    return text


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the project with the page's operator."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("csrc", "pcka", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__py*"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("classification", "detection", "benchmarks", "tools"):
        (folder / name).symlink_to(ROOT / name)
    write(blocks(OPERATOR, "cpp", "python"), folder)
    for name, diff in blocks(OPERATOR, "diff").items():
        (folder / name).write_text(edited((folder / name).read_text(), diff))
    return folder


def test_the_operators_edits_fit_the_files(extended):
    assert "row_energy" in (extended / "pcka" / "ops" / "_library.py").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not pcka.build_info()["extension"], reason="nothing is compiled")
def test_the_operator_compiles_and_passes_its_tests(extended):
    build, tests, *_ = commands(OPERATOR)
    run(build, extended, PCKA_SKIP_CUDA="1")
    run(tests, extended)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["csrc/cuda/row_energy.cu", "tests/emulation/test_kernels.cpp"])
def test_the_operator_compiles_for_the_emulator(extended, source):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    include = Path(torch.__file__).parent / "include"
    folders = [f"-I{extended / name}" for name in ("tests/emulation", "tests/csrc", "csrc")]
    options = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DUSE_CUDA"]
    target = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-isystem", include, "-x", "c++"]
    command = ["g++", *options, *folders, *target, source]
    result = subprocess.run(command, cwd=extended, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
