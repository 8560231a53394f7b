"""The sources compile against the headers of the oldest torch that is promised, and by clang.

A build sees the headers of one torch and one compiler. The others are checked here without making
code. The oldest headers come out of a wheel that pip downloads once, into the user's cache; of the
wheels of that version the smallest serves, as the headers are those of every platform.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MINIMUM = re.search(r'MINIMUM_TORCH = "(.+)"', (ROOT / "setup.py").read_text())[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pcka")
SMALLEST = ("--python-version", "3.12", "--platform", "macosx_11_0_arm64")

CPP = sorted(path for path in (ROOT / "csrc").rglob("*.cpp") if path.name != "build_info.cpp")
CUDA = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
major, minor = map(int, MINIMUM.split("."))
TARGET = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000ULL"


@pytest.fixture(scope="session")
def oldest(tmp_path_factory) -> Path:
    """The include folder of the oldest torch."""
    kept = CACHE / f"torch-{MINIMUM}"
    if not kept.exists():
        folder = tmp_path_factory.mktemp("wheel")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command = [*pip, *SMALLEST, "--dest", folder, f"torch=={MINIMUM}.*"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"no wheel of torch {MINIMUM} to be had: {result.stderr.strip()[-200:]}")
        with zipfile.ZipFile(next(folder.glob("torch-*.whl"))) as wheel:
            headers = [name for name in wheel.namelist() if name.startswith("torch/include/")]
            wheel.extractall(folder, headers)
        CACHE.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "torch", kept)
    return kept / "include"


def running() -> Path:
    return Path(torch.__file__).parent / "include"


def compiles(compiler: str, source: Path, include: Path, *options: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    command = [compiler, "-std=c++17", TARGET, *options, "-isystem", include, source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("source", CPP, ids=lambda path: path.name)
def test_the_oldest_torch(oldest, source, compiler):
    compiles(compiler, source, oldest, "-fsyntax-only", "-Wall", "-Wextra", "-Werror")


@pytest.mark.parametrize("source", CPP, ids=lambda path: path.name)
def test_clang(source):
    compiles("clang++", source, running(), "-fsyntax-only", "-Wall", "-Wextra", "-Werror")


@pytest.mark.parametrize("source", CUDA, ids=lambda path: path.name)
def test_the_oldest_torch_in_cuda(oldest, source, tmp_path):
    options = ("--ptx", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-o", str(tmp_path / "x.ptx"))
    compiles("nvcc", source, oldest, *options)


@pytest.mark.parametrize("source", CUDA, ids=lambda path: path.name)
def test_the_oldest_torch_in_emulated_cuda(oldest, source):
    """Where there is no nvcc, too."""
    emulation = f"-I{ROOT / 'tests' / 'emulation'}"
    options = ("-fsyntax-only", "-DUSE_CUDA", emulation, "-Wall", "-Wextra", "-x", "c++")
    compiles("g++", source, oldest, *options)
