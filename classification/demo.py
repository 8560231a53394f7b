"""Compare methods on handwritten digits, in minutes: ``python classification/demo.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from classification.arguments import demo_parser
from classification.compare import compare
from classification.config import CONFIGS
from pcka.engine.command import run_command
from pcka.engine.progress import console_log

METHODS = ("ce", "kd", "kd_fcka", "dist", "dist_fitnet_fcka")
EVAL_EVERY = 4  # epochs, out of 20; each is shorter than an evaluation


def run_demo(output: Path, seeds: Sequence[int], overrides: Sequence[str] = ()) -> str:
    """Train the teacher and students that are missing; return the table (Markdown).

    Args:
        output: receives a folder per run and the comparison's files.
        seeds: of the students.
        overrides: ``KEY VALUE`` pairs for all runs.
    """
    cache = str(output / "teacher")
    words = ["TEACHER.CACHE_DIR", cache, "EVAL_EVERY", str(EVAL_EVERY), *overrides]
    config_file = CONFIGS / "digits" / "resnet20_resnet8.yaml"
    return compare(config_file, METHODS, seeds, output, words).markdown()


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the demo as the arguments say; print and return the table."""
    given = demo_parser().parse_args(arguments)
    with console_log():
        table = run_demo(given.output, given.seeds)
    print(table)
    return table


if __name__ == "__main__":
    run_command(main, interrupted="repeat the command to continue after the last epoch of each run")
