"""What the scripts share: arguments and a log that goes well with progress bars."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.contrib.logging import logging_redirect_tqdm


def config_arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser of ``--config-file F [KEY VALUE ...]``; use ``parse_intermixed_args``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config-file", metavar="F", required=True, help="YAML configuration")
    parser.add_argument(
        "overrides", metavar="KEY VALUE", nargs="*", help="keys that override the file's"
    )
    return parser


@contextmanager
def console_log() -> Iterator[None]:
    """Print the log's lines, above a progress bar where there is one."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with logging_redirect_tqdm():
        yield
