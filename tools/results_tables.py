"""Write the docs' tables of results from their data: ``python -m tools.results_tables``.

A table lies between two comments, the first of which describes it::

    <!-- table: benchmarks/results/cifar100.csv
         columns: last_accuracy = last epoch (%), best_accuracy = best epoch (%)
         rows: ce, kd, kd_fcka
         difference: minus cross-entropy -->
    ...
    <!-- end of table -->

The file is a ``comparison.csv`` written by ``compare.py``, with one line per run. ``rows`` selects
and orders the methods (default: all, in file order); the others are compared with the first one,
under the heading ``difference``. ``--check`` changes nothing and fails if a table does not match
its data.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pcka.engine.arguments import command_parser
from pcka.engine.command import run_command
from pcka.engine.comparison import Comparison
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import write_text

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/results.md", "docs/log.md")
TABLE = re.compile(r"(<!-- table: (?P<about>.*?) -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
SETTINGS = {"columns", "rows", "difference"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Update the pages; with ``--check``, fail at the first one that is out of date.

    Raises:
        ConfigError: a table whose data is missing or, with ``--check``, one that differs.
    """
    parser = command_parser("Write the docs' tables from their figures.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if out of date")
    parser.add_argument("pages", nargs="*", type=Path, default=[ROOT / page for page in PAGES])
    given = parser.parse_args(arguments)
    for page in given.pages:
        text = page.read_text()
        written = with_tables(text, page)
        if written == text:
            continue
        if given.check:
            raise ConfigError(
                f"{page}: a table does not match its figures; run python -m tools.results_tables"
            )
        write_text(page, written)
        print(f"{page}: written", file=sys.stderr)


def with_tables(text: str, page: Path) -> str:
    """A page's text with each of its tables regenerated.

    Args:
        text: of the page.
        page: for messages.
    """
    return TABLE.sub(lambda found: found[1] + "\n" + table(found["about"], page) + "\n\n", text)


def table(about: str, page: Path) -> str:
    """A table in Markdown.

    Args:
        about: the file, and on further lines ``setting: value``; see the module.
        page: for messages.

    Raises:
        ConfigError: a missing file, or an unknown setting, method or column.
    """
    name, *lines = (line.strip() for line in about.strip().splitlines())
    settings = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in lines)}
    if unknown := settings.keys() - SETTINGS:
        raise ConfigError(f"{page}: the table of {name} has no setting {', '.join(unknown)}")
    path = ROOT / name
    if not path.is_file():
        raise ConfigError(f"{page}: the table's figures {name} are missing")
    runs = list(csv.DictReader(path.open()))
    if not runs:
        raise ConfigError(f"{page}: {name} has no runs")
    methods, columns = _choices(runs, settings)
    subject = next(iter(runs[0]))
    known = {run[subject] for run in runs}
    if absent := {m for m in methods if m not in known} | (columns.keys() - runs[0].keys()):
        raise ConfigError(f"{page}: {name} has no {', '.join(sorted(absent))}")
    comparison = Comparison(
        methods, columns, subject, settings.get("difference", "minus first row")
    )
    for run in runs:
        if run[subject] in methods:
            comparison.add(run[subject], int(run["seed"]), run)
    return comparison.table()


def _choices(
    runs: Sequence[dict[str, str]], settings: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The methods, and column -> heading."""
    subject, _, *keys = runs[0]
    methods = list(dict.fromkeys(run[subject] for run in runs))
    if "rows" in settings:
        methods = [method.strip() for method in settings["rows"].split(",")]
    pairs = (item.partition("=") for item in settings.get("columns", keys[0]).split(","))
    return methods, {key.strip(): (heading or key).strip() for key, _, heading in pairs}


if __name__ == "__main__":
    run_command(main)
