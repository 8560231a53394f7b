"""Runs so small that a test may train: 40 digits of 16 pixels, resnet8, two epochs."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from classification.config import load_config
from classification.models import create_model
from pcka.engine.run_folder import read_metrics

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "classification" / "digits" / "resnet20_resnet8.yaml"

# What differs between runs that learned the same: when, where, and beside how many others.
CIRCUMSTANCES = {"seconds", "images_per_second", "data_share", "students", "config"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums in one order, whatever machine the test runs on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def without_plots():
    """Runs draw no curves, which take longer than their training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("classification.run.plot_curves", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def digits_config():
    """The configuration file of the digits."""
    return DIGITS


@pytest.fixture(scope="session")
def random_teacher(tmp_path_factory):
    """The checkpoint of a resnet8 as it is made: a teacher that need not be trained."""
    path = tmp_path_factory.mktemp("teacher") / "resnet8.pth"
    torch.manual_seed(0)
    torch.save(create_model("resnet8", 10).state_dict(), path)
    return path


@pytest.fixture
def tiny_overrides(tmp_path):
    """KEY VALUE pairs of a run in ``tmp_path / name``; further keys by their dotted names.

    Without a name they are those of a comparison, whose runs have folders of their own.
    """

    def overrides(name: str = "run", **keys: object) -> list[str]:
        values = {
            **({"OUTPUT_DIR": tmp_path / name} if name else {}),
            "TEACHER.CACHE_DIR": tmp_path / "teachers",
            "TEACHER.NAME": "resnet8",
            "TEACHER.EPOCHS": 1,
            "DEVICE": "cpu",
            "CHANNELS_LAST": False,
            "AUTOCAST": "",
            "DATA.IMAGE_SIZE": 16,
            "DATA.HOLDOUT": 40,
            "DATA.TRAIN_IMAGES": 40,
            "SOLVER.EPOCHS": 2,
            "SOLVER.BATCH_SIZE": 10,
            "REPORT": False,
            **keys,
        }
        return [str(word) for pair in values.items() for word in pair]

    return overrides


@pytest.fixture
def tiny_config(tiny_overrides):
    """The configuration of such a run; ``method`` names a method file."""

    def config(method: str = "ce", name: str = "run", **keys: object):
        return load_config(DIGITS, tiny_overrides(name, **keys), method)

    return config


@pytest.fixture
def pair_config(tiny_config, random_teacher):
    """The same with that teacher, and a warm-up of the distillation."""

    def config(method: str, name: str, **keys: object):
        given = {"TEACHER.WEIGHTS": random_teacher, "DISTILL.WARMUP": 0.6, **keys}
        return tiny_config(method, name, **given)

    return config


@pytest.fixture(scope="session")
def assert_same_run():
    """``assert_same_run(ours, theirs)``: two folders hold the same training, bit for bit."""

    def check(ours: Path, theirs: Path) -> None:
        names = {"checkpoint.pth", "model_last.pth", "model_best.pth"}
        for name in names | {path.name for path in ours.glob("model_*.pth")}:
            _assert_same(
                *(torch.load(folder / name, weights_only=True) for folder in (ours, theirs)), name
            )
        _assert_same(*(read_metrics(folder / "metrics.jsonl") for folder in (ours, theirs)), "")

    return check


def _assert_same(ours: object, theirs: object, place: str) -> None:
    if isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda text: place + text)
    elif isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys(), place
        for key in ours.keys() - CIRCUMSTANCES:
            _assert_same(ours[key], theirs[key], f"{place}, {key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), place
        for index, pair in enumerate(zip(ours, theirs)):
            _assert_same(*pair, f"{place}[{index}]")
    else:
        assert ours == theirs, place


class Program:
    """A running script, in one process or, by torchrun, in several.

    Args:
        words: script and arguments.
        processes: number of processes.
        log: file that receives what it prints.
    """

    def __init__(self, words: list[str], processes: int, log: Path) -> None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        launcher = [] if processes == 1 else [*torchrun, str(processes)]
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, *words],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def wait(self, timeout: float = 300) -> int:
        """Return the exit status."""
        return self._process.wait(timeout)

    def succeed(self) -> str:
        """Return what it printed once it has ended, and well."""
        assert self.wait() == 0, self.log.read_text()[-5000:]
        return self.log.read_text()

    def kill_when(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Kill it in the middle of its work, once the condition is true."""
        self._await(condition, timeout)
        self.kill()

    def interrupt_when(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Send it what Ctrl-C sends, once the condition is true."""
        self._await(condition, timeout)
        self._process.send_signal(signal.SIGINT)

    def _await(self, condition: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self._process.poll() is None, self.log.read_text()[-5000:]
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(0.005)

    def kill(self) -> None:
        """Kill every process of it: those of torchrun lead sessions of their own."""
        if self._process.poll() is not None:
            return
        numbers = [self._process.pid, *_descendants(self._process.pid)]
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self._process.wait()
        while not all(map(_has_ended, numbers)):
            time.sleep(0.005)


def _descendants(number: int) -> list[int]:
    """The processes that one started, and those that they started."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{number}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return []
    children = [int(word) for text in lists for word in text.split()]
    return [*children, *itertools.chain.from_iterable(map(_descendants, children))]


def _has_ended(number: int) -> bool:
    """Whether a process is gone, or waits for nothing but its parent to notice its end."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """``start(*words, processes=1)``: a :class:`Program`; those left at the end are killed."""
    folder, programs = tmp_path_factory.mktemp("logs"), []

    def start(*words: object, processes: int = 1) -> Program:
        log = folder / f"{len(programs)}.txt"
        programs.append(Program([str(word) for word in words], processes, log))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()
