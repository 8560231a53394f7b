"""The operators' tests, on the device; on a GPU none of them may be skipped."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.gpu import output

FILES = ("tests/ops", "tests/cuda/test_on_gpu.py", "tests/classification/test_steps_on_gpu.py")
PROCESSES = 12
MARGIN = 12  # seconds for a stopped run to write its report
SHOWN = 12  # failures listed by name


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tests, write ``tests.xml`` and ``tests.json``; exit with 1 if one failed."""
    given = output.arguments(__doc__, arguments)
    report = given.output / "tests.xml"
    command = [sys.executable, "-m", "pytest", *FILES, "-vv", "--tb=short", f"--junitxml={report}"]
    command += ["-p", "no:cacheprovider", "-m", "not slow" if given.quick else "slow or not slow"]
    if given.device == "cuda":
        command += ["-n", str(PROCESSES)]
    complete = run(command, given.seconds - MARGIN)
    counted = count(report) if report.exists() else {"error": "pytest wrote no report"}
    bad = [*counted.get("failed", ["no report"])]
    if not complete:
        bad.append("not all were run")
        counted["stopped"] = f"stopped after {given.seconds - MARGIN:.0f} s"
    if given.device == "cuda":
        bad += counted.get("skipped", [])
    output.write(given.output, "tests", counted, summary(counted))
    sys.exit(1 if bad else 0)


def run(command: Sequence[str], seconds: float) -> bool:
    """Return whether pytest finished in time; if not, it is asked to report what there is."""
    process = subprocess.Popen(command)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=MARGIN - 2)
        return False
    return True


def count(report: Path) -> dict[str, Any]:
    """``passed``: count; ``failed`` and ``skipped``: names, with the first line of each reason."""
    passed, named = 0, {"failed": list[str](), "skipped": list[str]()}
    for case in ElementTree.parse(report).iter("testcase"):
        why = {child.tag: child.get("message", "") for child in case}
        kind = "failed" if {"failure", "error"} & why.keys() else "skipped"
        if not {"failure", "error", "skipped"} & why.keys():
            passed += 1
            continue
        first = next(iter(why.values())).splitlines()
        named[kind].append(f"{case.get('name')}: {first[0] if first else ''}")
    return {"passed": passed, **named}


def summary(counted: dict[str, Any]) -> list[str]:
    """The counts, then the failures and the first skips by name."""
    if "error" in counted:
        return [str(counted["error"])]
    failed, skipped = counted["failed"], counted["skipped"]
    lines = [f"{counted['passed']} passed, {len(failed)} failed, {len(skipped)} skipped"]
    lines += [counted["stopped"]] if "stopped" in counted else []
    lines += [f"FAILED {line}" for line in failed[:SHOWN]]
    return lines + [f"skipped {line}" for line in skipped[:2]]


if __name__ == "__main__":
    main()
