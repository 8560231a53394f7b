"""What the modules of the stages share: their arguments, and their JSON."""

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
    """Parse what every stage takes; ``output`` exists afterwards.

    ``seconds``: the stage's limit. One that starts programs stops them a little before.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parsed = parser.parse_args(given)
    parsed.output.mkdir(parents=True, exist_ok=True)
    parsed.seconds = float(os.environ.get("PCKA_STAGE_SECONDS", "600"))
    return parsed


def program(name: str) -> str | None:
    """Where a tool of the CUDA toolkit is; its folder need not be on PATH."""
    folders = ["/usr/local/cuda/bin", *sorted(glob("/opt/nvidia/nsight-compute/*"), reverse=True)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def watcher(given: argparse.Namespace, name: str, driver: Sequence[str]) -> str:
    """Where a tool is that watches the driver; without it, or a GPU, the driver alone runs.

    Args:
        given: of :func:`arguments`.
        name: of the tool.
        driver: command that is to be watched.

    Raises:
        SystemExit: the driver ran by itself, to this end.
    """
    found = program(name)
    if given.device == "cuda" and found is not None:
        return found
    code = subprocess.run(driver).returncode
    why = f"{name} is not installed" if given.device == "cuda" else "on a CPU"
    lines = [f"{why}: the driver ran by itself and ended with {code}"]
    write(given.output, name.removeprefix("compute-"), {}, lines)
    sys.exit(code)


def write(folder: Path, name: str, content: dict[str, Any], summary: Sequence[str]) -> None:
    """``name.json``, and the summary on the screen."""
    text = json.dumps({**content, "summary": list(summary)}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n")
    print("\n".join(summary), flush=True)
