"""Code shared by the stages' modules: arguments and JSON output."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any


def arguments(description: str | None, given: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments that every stage takes; create the folder ``output``.

    ``seconds`` is the stage's time limit. A stage that starts programs stops them a little earlier.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="smoke test with tiny sizes")
    parsed = parser.parse_args(given)
    parsed.output.mkdir(parents=True, exist_ok=True)
    parsed.seconds = float(os.environ.get("PCKA_STAGE_SECONDS", "600"))
    return parsed


def program(name: str) -> str | None:
    """Path of a tool of the CUDA toolkit, whose folder need not be on PATH; None if missing."""
    folders = ["/usr/local/cuda/bin", *sorted(glob("/opt/nvidia/nsight-compute/*"), reverse=True)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def watcher(given: argparse.Namespace, name: str, driver: Sequence[str]) -> str:
    """Path of a tool that watches the driver; without it, or a GPU, run the driver alone and exit.

    Args:
        given: returned by :func:`arguments`.
        name: name of the tool.
        driver: command to watch.

    Raises:
        SystemExit: with the exit code of the driver, which ran by itself.
    """
    found = program(name)
    if given.device == "cuda" and found is not None:
        return found
    code = subprocess.run(driver).returncode
    why = f"{name} is not installed" if given.device == "cuda" else "on a CPU"
    lines = [f"{why}: the driver ran alone and exited with {code}"]
    write(given.output, name.removeprefix("compute-"), {}, lines)
    sys.exit(code)


def write(folder: Path, name: str, content: dict[str, Any], summary: Sequence[str]) -> None:
    """Write ``name.json``, and print the summary."""
    text = json.dumps({**content, "summary": list(summary)}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n")
    print("\n".join(summary), flush=True)
