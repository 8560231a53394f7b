"""What the scripts share: arguments and a log that goes well with progress bars."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tqdm.contrib.logging import logging_redirect_tqdm

from classification.config import CONFIGS, method_files


def config_arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser of ``--config-file F [KEY VALUE ...]``; use ``parse_intermixed_args``.

    ``--list`` prints the configurations and methods that there are, and ends.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config-file", metavar="F", required=True, help="YAML configuration")
    parser.add_argument("--list", action=_List, help="print the configurations and methods")
    parser.add_argument(
        "overrides", metavar="KEY VALUE", nargs="*", help="keys that override the file's"
    )
    return parser


class _List(argparse.Action):
    """Prints the catalog and ends, as ``--help`` does."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(catalog())
        parser.exit()


def catalog() -> str:
    """Return the configuration files and the methods, a line each."""
    runs = sorted(
        path
        for path in CONFIGS.rglob("*.yaml")
        if path.parent.name != "methods" and path.stem != "base"
    )
    lines = ["Configurations (--config-file F):"]
    lines += [f"  configs/classification/{path.relative_to(CONFIGS)}" for path in runs]
    lines += ["", "Methods (--method M, on any of them):"]
    lines += [f"  {name:16s} {_headline(path)}" for name, path in method_files().items()]
    return "\n".join(lines)


def _headline(path: Path) -> str:
    return path.read_text().partition("\n")[0].removeprefix("# ")


@contextmanager
def console_log() -> Iterator[None]:
    """Print the log's lines, above a progress bar where there is one."""
    handler = logging.StreamHandler()
    handler.setFormatter(_RunFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    with logging_redirect_tqdm():
        yield


class _RunFormatter(logging.Formatter):
    """Names the folder of the run that a line concerns: several may be trained side by side."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        run = getattr(record, "run", None)
        return line if run is None else f"{line}  ({run.directory})"
