"""Checks before training: verdicts, and the checks of the machine that apply to any run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import platform
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

import pcka

PASS, WARN, FAIL, SKIP = "ok", "warn", "FAIL", "-"
DRIVER = Path("/dev/nvidiactl")  # exists if there is a GPU with a driver
_WIDTH = 100  # columns of output

# Imports that fail in an old detectron2 with current libraries (tools/install_detectron2.py).
_DETECTRON2_PROBE = (
    "import detectron2.model_zoo, detectron2.data.transforms, detectron2.evaluation, "
    "detectron2.modeling"
)
_REBUILD = "python setup.py build_ext --inplace"


class Verdict(NamedTuple):
    """What a check found.

    Attributes:
        status: one of PASS, WARN, FAIL, SKIP.
        text: what was found and, unless the check passes, how to fix it.
    """

    status: str
    text: str


class Finding(NamedTuple):
    """The outcome of a named check."""

    what: str
    status: str
    text: str


Check = Callable[[], Verdict]


def conclude(checks: Iterable[tuple[str, Check]]) -> list[Finding]:
    """Run the checks, print their findings and how many failed, and return the findings.

    Raises:
        SystemExit: with status 1 if a check failed.
    """
    findings = examine(checks)
    print(screen(findings))
    failed = sum(finding.status == FAIL for finding in findings)
    warned = sum(finding.status == WARN for finding in findings)
    print(f"\n{failed} of {len(findings)} checks failed, {warned} warned")
    if failed:
        raise SystemExit(1)
    return findings


def needing(what: str, found: Callable[[], object], check: Check) -> Check:
    """Wrap a check so that it runs only if what it needs was found.

    Args:
        what: name of what the check needs.
        found: returns what the check needs, or None.
        check: the check to wrap.
    """

    def guarded() -> Verdict:
        if found() is None:
            return Verdict(SKIP, f"skipped: needs the {what}")
        return check()

    return guarded


def telling(check: Check, logger: logging.Logger, *categories: type[Warning]) -> Check:
    """Wrap a check so that its verdict includes the warnings that training would give.

    Args:
        check: the check to wrap.
        logger: its warnings are included, and shown nowhere else.
        categories: of Python warnings, treated likewise.
    """

    def told() -> Verdict:
        with messages_of(logger) as logged, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            status, text = check()
        doubts = logged + [str(w.message) for w in caught if issubclass(w.category, categories)]
        if not doubts:
            return Verdict(status, text)
        return Verdict(WARN if status == PASS else status, "; ".join([text, *doubts]))

    return told


@contextmanager
def messages_of(logger: logging.Logger, level: int = logging.WARNING) -> Iterator[list[str]]:
    """Collect a logger's messages, which are not shown anywhere else meanwhile."""
    found: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(min(level, logger.getEffectiveLevel()))
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = before[0]
        logger.setLevel(before[1])


def examine(checks: Iterable[tuple[str, Check]]) -> list[Finding]:
    """Run the checks one after the other; an exception becomes the check's verdict."""
    findings = []
    for what, check in checks:
        try:
            verdict = check()
        except Exception as error:  # whatever it is, it would end a training run
            name = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            verdict = Verdict(FAIL, name + " ".join(str(error).split()))
        findings.append(Finding(what, *verdict))
    return findings


def screen(findings: Iterable[Finding]) -> str:
    """The findings as text, one or more lines each."""
    findings = list(findings)
    indent = max(len(finding.what) for finding in findings) + 8
    lines = []
    for what, status, text in findings:
        start = f"{status:5s} {what}".ljust(indent)
        wrapped = textwrap.wrap(text, _WIDTH - indent, break_long_words=False) or [""]
        lines += [start + wrapped[0], *(" " * indent + line for line in wrapped[1:])]
    return "\n".join(lines)


def machine_checks(*, for_detectors: bool = False) -> list[tuple[str, Check]]:
    """Checks of the installation and the devices; detectors require detectron2."""
    return [
        ("torch", check_torch),
        ("GPU", check_gpu),
        ("compiler", check_compiler),
        ("operators", check_operators),
        ("detectron2", lambda: check_detectron2(needed=for_detectors)),
    ]


def check_torch() -> Verdict:
    """Versions of torch, CUDA and Python."""
    cuda = torch.version.cuda
    built = f"for CUDA {cuda}" if cuda else "for the CPU"
    return Verdict(PASS, f"{torch.__version__}, built {built}; Python {platform.python_version()}")


def check_gpu() -> Verdict:
    """Whether there is a GPU that torch can use."""
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        return Verdict(
            PASS,
            f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}"
            + (f"; {count} GPUs" if count > 1 else ""),
        )
    if not DRIVER.exists():
        return Verdict(PASS, "none: runs use the CPU")
    reason = (
        "is newer than the driver supports (see nvidia-smi)"
        if torch.version.cuda
        else "is a CPU-only build"
    )
    return Verdict(WARN, f"found, but this torch {reason}; install a torch that fits it")


def check_compiler() -> Verdict:
    """Which compilers there are for the operators."""
    there = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    nvcc = shutil.which("nvcc")
    compiled = pcka.build_info()["compiler"]
    if not there:
        text = "none found; needed to compile the operators: install g++"
        return Verdict(PASS if compiled else WARN, text)
    if torch.cuda.is_available() and not nvcc and not pcka.build_info()["cuda_loaded"]:
        return Verdict(WARN, f"{there[0]}, no nvcc: install the CUDA toolkit, then {_REBUILD}")
    return Verdict(PASS, f"{there[0]}, {'nvcc' if nvcc else 'no nvcc'}")


def check_operators() -> Verdict:
    """Whether the compiled operators are loaded and contain code for this GPU."""
    info = pcka.build_info()
    reasons = info["fallback"]
    assert isinstance(reasons, dict)
    if not info["extension"]:
        return Verdict(WARN, f"falling back to PyTorch: {reasons.get('cpu')}; {_REBUILD}")
    archs = info["cuda_archs"]
    assert isinstance(archs, list)
    if not torch.cuda.is_available():
        return Verdict(PASS, f"compiled by {info['compiler']}, loaded for the CPU")
    if not info["cuda_loaded"]:
        return Verdict(
            WARN, f"falling back to PyTorch on the GPU: {reasons.get('cuda')}; {_REBUILD}"
        )
    major, minor = torch.cuda.get_device_capability()
    if not any(runs_on(arch, major, minor) for arch in archs):
        return Verdict(
            FAIL,
            f"compiled for {', '.join(archs)}, the GPU is sm_{major}{minor}; "
            f"TORCH_CUDA_ARCH_LIST={major}.{minor} {_REBUILD}",
        )
    return Verdict(PASS, f"compiled for {', '.join(archs)}, loaded")


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for ``arch`` (``sm_80``, ``sm_90a``) runs on a GPU of this capability."""
    number = "".join(letter for letter in arch if letter.isdigit())
    if not arch.startswith("sm_"):
        return False
    if arch[-1].isalpha():  # for exactly that architecture
        return number == f"{major}{minor}"
    return int(number[:-1]) == major and int(number[-1]) <= minor


def check_detectron2(*, needed: bool = False) -> Verdict:
    """Whether detectron2 is installed, for detection/, and importable with the other packages."""
    if importlib.util.find_spec("detectron2") is None:
        text = "not installed; detectors need it: python tools/install_detectron2.py"
        return Verdict(FAIL if needed else PASS, text)
    call = [sys.executable, "-c", _DETECTRON2_PROBE]
    ended = subprocess.run(call, capture_output=True, text=True)
    if ended.returncode != 0:
        last = (ended.stderr.strip().splitlines() or ["it printed no error"])[-1]
        return Verdict(
            FAIL,
            f"cannot be imported: {last}; pip uninstall detectron2, then "
            "python tools/install_detectron2.py, which repairs it",
        )
    return Verdict(PASS, f"{importlib.metadata.version('detectron2')}, imports")


def check_disk(
    folder: str | Path, needed: int, way_out: str = "make room, or choose another OUTPUT_DIR"
) -> Verdict:
    """Whether there is enough disk space for what a run writes.

    Args:
        folder: the output folder; need not exist yet.
        needed: bytes that the run writes.
        way_out: what to do if there is not enough space.
    """
    path = Path(folder).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    text = f"{_size(free)} free for {folder}, a run writes about {_size(needed)}"
    if free < needed:
        return Verdict(FAIL, f"{text}; {way_out}")
    return Verdict(PASS if free > 2 * needed else WARN, text)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
