"""Compare methods on handwritten digits, in minutes: ``python classification/demo.py [OUTPUT]``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from classification.arguments import demo_parser
from classification.compare import compare
from classification.config import CONFIGS
from pcka.engine.command import run_command
from pcka.engine.progress import console_log

METHODS = ("ce", "kd", "kd_fcka", "dist", "dist_fitnet_fcka")
SEEDS = (0, 1, 2)


def run_demo(output: Path, overrides: Sequence[str] = (), seeds: Sequence[int] = SEEDS) -> str:
    """Train teacher and students that are not trained yet; return the table (Markdown).

    Args:
        output: a folder for each run and the comparison's files go there.
        overrides: ``KEY VALUE`` pairs for all runs.
        seeds: of the students.
    """
    words = ["TEACHER.CACHE_DIR", str(output / "teacher"), *overrides]
    config_file = CONFIGS / "digits" / "resnet20_resnet8.yaml"
    return compare(config_file, METHODS, seeds, output, words).markdown()


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the demo into the folder of the arguments; print and return the table."""
    given = demo_parser().parse_args(arguments)
    with console_log():
        table = run_demo(given.output)
    print(table)
    return table


if __name__ == "__main__":
    run_command(main, interrupted="the same command goes on after the last epoch of each run")
