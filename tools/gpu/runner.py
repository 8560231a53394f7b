"""Runs the stages, each in a process with a time limit, and keeps what they write."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tools.gpu.report import said
from tools.gpu.stages import Stage, together

ROOT = Path(__file__).resolve().parents[2]
SHOWN_OF_A_FAILURE = 25  # lines
POLL_SECONDS = 0.1
PATIENCE = 5
WIDTH = 200  # of a line in the summary


@dataclass
class Running:
    """A running stage."""

    stage: Stage
    folder: Path
    limit: float
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def status(self) -> str | None:
        """``passed``, ``failed`` or ``timed out``; None while it runs within its limit."""
        code = self.process.poll()
        if code is not None:
            return "passed" if code == 0 else "failed"
        return "timed out" if self.seconds > self.limit else None

    def stop(self) -> None:
        """Kill the process and all that it started."""
        if self.log.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


@dataclass
class Runner:
    """Runs stages and writes ``results.json`` and ``log.txt`` after each group of them.

    Args:
        out: folder of the results; few files, as only a few may come back from the machine.
        work: a folder for everything else.
        device, quick: passed to every stage.
        environment: environment variables of every stage.
        bundle: the manifest of what was unpacked.
    """

    out: Path
    work: Path
    device: str
    quick: bool
    environment: Mapping[str, str]
    bundle: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.results: dict[str, Any] = {
            "command": shlex.join(["python", "tools/gpu_check.py", *map(_anywhere, sys.argv[1:])]),
            "device": self.device,
            "quick": self.quick,
            "bundle": dict(self.bundle),
            "stages": {},
        }

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run all stages; if a needed one fails, return False at once."""
        for group in together(stages):
            running = [self._start(stage) for stage in group]
            try:
                self._wait_for(running)
            finally:
                for one in running:
                    one.stop()
            if any(stage.needed and stage.name in self.failed for stage in group):
                return False
        return True

    def _wait_for(self, running: Sequence[Running]) -> None:
        at_work = list(running)
        while at_work:
            for one in tuple(at_work):
                status = one.status()
                if status is not None:
                    at_work.remove(one)
                    self._finish(one, status)
            time.sleep(POLL_SECONDS)

    @property
    def failed(self) -> list[str]:
        """Names of the stages that did not pass."""
        stages = self.results["stages"].items()
        return [name for name, stage in stages if stage["status"] != "passed"]

    def _start(self, stage: Stage) -> Running:
        folder = self.work / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", stage.module, "--output", str(folder)]
        command += ["--device", self.device, *stage.arguments]
        command += ["--quick", *stage.quick] if self.quick else []
        # A CPU only rehearses: what matters there is that a stage ends, not when.
        limit = stage.seconds * (PATIENCE if self.device == "cpu" else 1)
        print(f"[{stage.name}] at most {limit} s", flush=True)
        log = (self.work / f"{stage.name}.log").open("wb")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **self.environment, "PCKA_STAGE_SECONDS": str(limit)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return Running(stage, folder, limit, process, log)

    def _finish(self, one: Running, status: str) -> None:
        seconds = round(one.seconds, 1)
        one.stop()  # including what it left running
        written = {path.stem: _read(path) for path in sorted(one.folder.glob("*.json"))}
        self.results["stages"][one.stage.name] = {
            "status": status, "seconds": seconds, "limit": one.limit, "written": written,
        }  # fmt: skip
        text = Path(one.log.name).read_text(errors="replace")
        with (self.out / "log.txt").open("a") as log:
            log.write(f"===== {one.stage.name}: {status} after {seconds} s\n{text}\n")
        for name in one.stage.files:
            if (one.folder / name).exists():
                shutil.copyfile(one.folder / name, self.out / name)
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
        print(f"[{one.stage.name}] {status} after {seconds} s", flush=True)
        if status != "passed":
            print("\n".join(text.splitlines()[-SHOWN_OF_A_FAILURE:]), flush=True)


def _anywhere(word: str) -> str:
    """A command-line argument without machine-specific folders."""
    return Path(word).name if Path(word).is_absolute() else word


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return {"unreadable": path.name}


def summary(results: Mapping[str, Any], most: int = 60) -> list[str]:
    """At most ``most`` lines: every stage's status, then the stages' own lines."""
    lines = [f"{results['command']} on {results['device']}"]
    told: dict[str, list[str]] = {}
    for name, stage in results["stages"].items():
        lines.append(f"{name}: {stage['status']} after {stage['seconds']} s of {stage['limit']}")
        told[name] = [f"[{name}] {line}"[:WIDTH] for line in said(stage)]
    room = _share([len(part) for part in told.values()], most - len(lines))
    for part in told.values():
        left_out = len(part) - room
        lines += part if left_out <= 0 else part[: room - 1]
        lines += [f"({left_out + 1} more lines are in results.json)"] if left_out > 0 else []
    return lines


def _share(counts: Sequence[int], room: int) -> int:
    """The most lines that each may have, so that those with fewer leave more to the others."""
    share = max([0, *counts])
    while share > 1 and sum(min(count, share) for count in counts) > room:
        share -= 1
    return share
