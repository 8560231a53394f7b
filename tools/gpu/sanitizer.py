"""compute-sanitizer's four tools over small shapes, at the same time.

Errors in kernels of other libraries are counted separately. If the program is missing, or on a CPU,
the driver runs by itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.gpu import output

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
DRIVER = ("-m", "tools.gpu.small_shapes")
OWN = "pcka"  # in the name of every kernel of this project
PORT, PORTS = 49152, 64  # a range for each tool
MARGIN = 8  # seconds for reading the logs


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``sanitizer.txt`` and its JSON.

    Exits with 1 if one of our kernels is at fault, or a tool did not finish.
    """
    given = output.arguments(__doc__, arguments)
    driver = [sys.executable, *DRIVER, given.device, *(["--quick"] if given.quick else [])]
    program = output.watcher(given, "compute-sanitizer", driver)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    logs = {tool: given.output / f"{tool}.log" for tool in TOOLS}
    began = time.monotonic()
    running = {
        tool: subprocess.Popen(
            [*_command(program, tool, index, logs[tool]), *driver], env=environment
        )
        for index, tool in enumerate(TOOLS)
    }
    found, texts = {}, []
    for tool, process in running.items():
        try:
            left = began + given.seconds - MARGIN - time.monotonic()
            process.wait(timeout=max(left, 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        text = logs[tool].read_text(errors="replace") if logs[tool].exists() else ""
        found[tool] = {**read(text), "exit": process.returncode}
        texts.append(f"===== {tool}\n{text[:200_000]}\n")
    (given.output / "sanitizer.txt").write_text("".join(texts))
    lines = [f"{tool}: {_verdict(result)}" for tool, result in found.items()]
    output.write(given.output, "sanitizer", {"tools": found}, lines)
    sys.exit(0 if all(r["finished"] and not r["own"] for r in found.values()) else 1)


def _command(program: str, tool: str, index: int, log: Path) -> list[str]:
    command = [
        program, "--tool", tool, "--log-file", str(log), "--print-limit", "50",
        "--launch-timeout", "120", "--port", str(PORT + PORTS * index),
        "--target-processes", "application-only",
    ]  # fmt: skip
    # initcheck must see what every kernel writes.
    ours = [] if tool == "initcheck" else ["--kernel-name", f"kernel_substring={OWN}"]
    return [*command, *ours]


def read(log: str) -> dict[str, int | bool]:
    """``own`` and ``other``: errors in our and others' kernels; ``finished``: has a summary."""
    finished = re.search(r"^========= \w+ SUMMARY:", log, re.MULTILINE) is not None
    places = []  # per error, the lines that say where on the device
    for block in re.split(r"^=========\s*$", log, flags=re.MULTILINE):
        lines = [line for line in block.splitlines() if re.search(r" at \S", line)]
        places.append(" ".join(line for line in lines if "Host Frame" not in line))
    errors = [place for place in places if place]
    own = sum(OWN in place for place in errors)
    return {"own": own, "other": len(errors) - own, "finished": finished}


def _verdict(result: dict[str, int | bool]) -> str:
    if not result["finished"]:
        return f"no summary (exited with {result['exit']}), {result['own']} errors in our kernels"
    return f"{result['own']} errors in our kernels, {result['other']} in others"


if __name__ == "__main__":
    main()
