"""Check that this machine can train a configuration: ``pcka doctor --config-file F``."""

from __future__ import annotations

import detection  # noqa: F401  (answers --help before the slow imports)

# isort: split

import argparse
import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from detection.arguments import doctor_parser
from pcka.engine.command import run_command
from pcka.engine.doctor import SKIP, Check, Finding, Verdict, conclude, machine_checks


def main(arguments: Sequence[str] | None = None) -> list[Finding]:
    """Run the checks given by the arguments; print one line per finding, and return the findings.

    Raises:
        SystemExit: with status 1 if a check failed.
    """
    given = doctor_parser().parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory() as aside:
        return conclude(machine_checks(for_detectors=True) + _checks(given, Path(aside)))


def _checks(given: argparse.Namespace, aside: Path) -> list[tuple[str, Check]]:
    """The checks of the configuration; skipped if detectron2 cannot be imported."""
    try:
        importlib.import_module("detectron2.modeling")
    except Exception:  # an old release fails in many ways with current libraries
        lacking = Verdict(SKIP, "skipped: needs detectron2")
        return [("configuration", lambda: lacking)]
    from detection.examination import Examination

    return Examination(given.config_file, given.overrides, aside).checks()


if __name__ == "__main__":
    run_command(main)
