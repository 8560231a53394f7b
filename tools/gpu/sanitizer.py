"""compute-sanitizer's four tools over small shapes, at the same time.

Errors in kernels of other libraries are counted apart. A tool that is not there, or that refuses
the machine, is noted and fails nothing; on a CPU the driver runs by itself.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.gpu import output

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
DRIVER = ("-m", "tools.gpu.small_shapes")
OWN = "pcka"  # in the name of every kernel of this project
PORT, PORTS = 49152, 64  # each tool its own range
SECONDS = 80


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``sanitizer.txt`` and its JSON; end with 1 where a kernel of ours is at fault."""
    given = output.arguments(__doc__, arguments)
    driver = [sys.executable, *DRIVER, given.device, *(["--quick"] if given.quick else [])]
    program = shutil.which("compute-sanitizer")
    if given.device == "cpu" or program is None:
        code = subprocess.run(driver).returncode
        why = "on a CPU" if given.device == "cpu" else "compute-sanitizer is not installed"
        lines = [f"{why}: the driver ran by itself and ended with {code}"]
        output.write(given.output, "sanitizer", {"tools": {}}, lines)
        sys.exit(code)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    logs = {tool: given.output / f"{tool}.log" for tool in TOOLS}
    running = {
        tool: subprocess.Popen(
            [*_command(program, tool, index, logs[tool]), *driver], env=environment
        )
        for index, tool in enumerate(TOOLS)
    }
    found = {}
    for tool, process in running.items():
        try:
            process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        text = logs[tool].read_text(errors="replace") if logs[tool].exists() else ""
        found[tool] = {**read(text), "exit": process.returncode}
    with (given.output / "sanitizer.txt").open("w") as whole:
        for tool, log in logs.items():
            text = log.read_text(errors="replace") if log.exists() else ""
            whole.write(f"===== {tool}\n{text[:200_000]}\n")
    lines = [f"{tool}: {_verdict(result)}" for tool, result in found.items()]
    output.write(given.output, "sanitizer", {"tools": found}, lines)
    sys.exit(1 if any(result["own"] for result in found.values()) else 0)


def _command(program: str, tool: str, index: int, log: Path) -> list[str]:
    command = [
        program, "--tool", tool, "--log-file", str(log), "--print-limit", "50",
        "--launch-timeout", "120", "--port", str(PORT + PORTS * index),
        "--target-processes", "application-only",
    ]  # fmt: skip
    # initcheck has to see what every kernel writes.
    ours = [] if tool == "initcheck" else ["--kernel-name", f"kernel_substring={OWN}"]
    return [*command, *ours]


def read(log: str) -> dict[str, int | bool]:
    """``own`` and ``other``: errors by whose kernel; ``finished``: the tool came to its summary."""
    finished = re.search(r"^========= \w+ SUMMARY:", log, re.MULTILINE) is not None
    places = []  # of each error, the lines that say where on the device
    for block in re.split(r"^=========\s*$", log, flags=re.MULTILINE):
        lines = [line for line in block.splitlines() if re.search(r" at \S", line)]
        places.append(" ".join(line for line in lines if "Host Frame" not in line))
    errors = [place for place in places if place]
    own = sum(OWN in place for place in errors)
    return {"own": own, "other": len(errors) - own, "finished": finished}


def _verdict(result: dict[str, int | bool]) -> str:
    if not result["finished"]:
        return (
            f"no summary (ended with {result['exit']}), {result['own']} errors of ours until then"
        )
    return f"{result['own']} errors of ours, {result['other']} in kernels of others"


if __name__ == "__main__":
    main()
