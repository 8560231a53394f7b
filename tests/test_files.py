"""Files that are written whole, and read without running what they hold."""

from __future__ import annotations

import argparse
import io
import random
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pcka
from pcka.checkpoint import (
    load_weights,
    save_student,
)
from pcka.files import CheckpointError, atomic_save, load_file

REPOSITORY = Path(pcka.__file__).parents[1]


STUDENT = nn.Sequential(nn.Linear(4, 3))


class _Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


PICKLED = {
    "argparse.Namespace": {"opt": argparse.Namespace(lr=0.1), "model": STUDENT.state_dict()},
    "multiarray.scalar": {"best_acc": np.float64(71.5), "state_dict": STUDENT.state_dict()},
    "modules.container": STUDENT,
    "container.Sequential": {"model": STUDENT, "epoch": 240},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("found", PICKLED)
def test_a_pickled_object_is_refused_with_the_way_out(found, zipped, tmp_path, monkeypatch):
    path = tmp_path / "resnet_last.pth"
    torch.save(PICKLED[found], path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"{found}.*trust") as caught:
        load_file(path)
    way_out = re.search(r'python -c "(.*)"', str(caught.value))[1]
    monkeypatch.chdir(tmp_path)
    exec(way_out, {})
    assert load_weights(nn.Sequential(nn.Linear(4, 3)), tmp_path / "weights.pth").complete


def test_a_malicious_pickle_is_not_executed(tmp_path):
    path, marker = tmp_path / "file.pth", tmp_path / "executed"
    torch.save({"model": STUDENT.state_dict(), "opt": _Exploit(marker)}, path)
    with pytest.raises(CheckpointError, match="open"):
        load_weights(nn.Sequential(nn.Linear(4, 3)), path)
    assert not marker.exists()
    torch.load(path, weights_only=False)["opt"].close()
    assert marker.exists(), "the file was harmless, so the test has shown nothing"


def _truncated(path: Path) -> bytes:
    torch.save(torch.ones(10_000), path)
    return path.read_bytes()[:20_000]


@pytest.mark.parametrize("make", [lambda _: b"", lambda _: b"Copyright", _truncated])
def test_a_damaged_file_is_named(make, tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(make(path))
    with pytest.raises(CheckpointError, match=r"file\.pth' is damaged"):
        load_file(path)


def _same_tree(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same_tree(one[k], other[k]) for k in one)
    return one == other


def _checkpoint() -> dict[str, object]:
    """A student and its momentum, large enough that most bytes are of tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    momentum = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    return {"epoch": 3, "model": model.state_dict(), "momentum": momentum}


@pytest.mark.parametrize(("content", "flips"), [(_checkpoint()["model"], 200), (_checkpoint(), 60)])
def test_a_flipped_bit_is_refused_or_changes_nothing(content, flips, tmp_path):
    """No checksum covers the padding between entries and the times of the archive."""
    path, chance = tmp_path / "file.pth", random.Random(0)
    torch.save(content, path)
    whole, refused = path.read_bytes(), 0
    for _ in range(flips):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert _same_tree(load_file(path), content)
        except CheckpointError as error:
            assert "file.pth' is damaged" in str(error)
            refused += 1
    assert refused >= 0.97 * flips


def test_a_file_written_without_checksums_loads(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STUDENT.state_dict(), tmp_path / "file.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    loaded = load_file(tmp_path / "file.pth")
    assert all(torch.equal(loaded[name], value) for name, value in STUDENT.state_dict().items())


def test_an_absent_file_is_an_ordinary_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_file(tmp_path / "none.pth")


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "folder" / "file.pth"
    atomic_save({"generation": 1}, path)
    with pytest.raises(AttributeError):
        atomic_save(lambda: None, path)
    assert load_file(path) == {"generation": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("write", range(1, 8))
def test_ctrl_c_within_a_write_stays_ctrl_c(tmp_path, monkeypatch, write):
    """torch.save alone makes a RuntimeError of most of them."""

    class File(io.FileIO):
        written = 0

        def write(self, data):
            self.written += 1
            if self.written == write:
                raise KeyboardInterrupt
            return super().write(data)

    path = tmp_path / "checkpoint.pth"
    atomic_save({"generation": 1}, path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: File(self, mode))
        with pytest.raises(KeyboardInterrupt):
            atomic_save({"w": torch.zeros(1000)}, path)
    assert load_file(path) == {"generation": 1}
    assert list(tmp_path.iterdir()) == [path]


GENERATION_BYTES = 2**26  # takes long enough to write that the kill lands in the midst of it
SAVE_FOR_EVER = f"""
import itertools, sys, torch
from pcka.files import atomic_save
for generation in itertools.count(1):
    atomic_save({{"w": torch.full(({GENERATION_BYTES // 4},), float(generation))}}, sys.argv[1])
"""
KILL_BEFORE_REPLACE = """
import os, signal, sys, torch
from pcka.files import atomic_save
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
atomic_save({"w": torch.ones(1000)}, sys.argv[1])
"""


def _start(script: str, path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=REPOSITORY)


def _leftovers(path: Path) -> list[Path]:
    return [other for other in path.parent.iterdir() if other != path]


def _wait_until_written(path: Path, size: int) -> None:
    """Return while a save is under way that has written `size` bytes."""
    while True:
        for temporary in _leftovers(path):
            try:
                if temporary.stat().st_size >= size:
                    return
            except FileNotFoundError:  # it has just become the checkpoint
                continue


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_a_kill_during_a_save_leaves_a_whole_file(fraction, tmp_path):
    path = tmp_path / "checkpoint.pth"
    atomic_save({"w": torch.zeros(1)}, path)
    process = _start(SAVE_FOR_EVER, path)
    try:
        _wait_until_written(path, int(fraction * GENERATION_BYTES))
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    weights = load_file(path)["w"]
    assert weights.numel() in (1, GENERATION_BYTES // 4)
    assert weights.min() == weights.max()


def test_a_disk_that_is_full_is_told_with_the_path(tmp_path):
    path = tmp_path / "model.pth"
    atomic_save({"a": 1}, path)
    before = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match=r"File too large; not written: '.*model\.pth'"):
            atomic_save({"a": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_kill_before_the_last_step_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pth"
    atomic_save({"generation": 1}, path)
    assert _start(KILL_BEFORE_REPLACE, path).wait() == -signal.SIGKILL
    assert load_file(path) == {"generation": 1}

    [leftover] = _leftovers(path)
    assert leftover.name.startswith(".")
    assert leftover.suffix == ".tmp"
    assert list(tmp_path.glob("*.pth")) == [path]

    atomic_save({"generation": 2}, path)
    assert load_file(path) == {"generation": 2}


def test_a_damaged_safetensors_file_is_named(tmp_path):
    path = tmp_path / "file.safetensors"
    torch.save(STUDENT.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"safetensors file, .*file\.safetensors' is dam"):
        load_file(path)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (load_file, lambda path: save_student(STUDENT, path)):
        with pytest.raises(ImportError, match=r"safetensors is not installed; .*pcka\[export\]"):
            use(tmp_path / "file.safetensors")
    assert not list(tmp_path.iterdir())
