"""Command-line parsers: cheap to import, so that ``--help`` responds at once."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

# Upper case throughout, unlike methods, numbers and files (MODEL.pth).
DOTTED_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z][A-Z0-9_]*)+")
ANSWERED = ("-h", "--help", "--list")  # need only the command's parser

MakeParser = Callable[[], argparse.ArgumentParser]


def command_parser(description: str, *examples: str) -> argparse.ArgumentParser:
    """Return a parser that accepts ``--debug`` and whose help ends with examples."""
    shown = "\n".join(f"  {line}" for example in examples for line in example.splitlines())
    parser = argparse.ArgumentParser(
        description=textwrap.fill(description, 78),
        epilog=f"for example:\n{shown}" if shown else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    return parser


def add_runs(parser: argparse.ArgumentParser, *, seeds: Sequence[int], output: str) -> None:
    """Add ``--seeds`` and ``--output``, with defaults, for a command that compares runs."""
    shown = " ".join(map(str, seeds))
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=list(seeds),
        metavar="S",
        help=f"seeds of the students (default: {shown})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(output),
        metavar="DIR",
        help="folder for the runs and the table (default: %(default)s)",
    )


def positive(text: str) -> int:
    """The ``type`` of an option that expects a positive integer."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


class Answer(argparse.Action):
    """An option that prints text and exits, like ``--help``; ``const`` returns the text."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, const: Callable[[], str], help: str
    ) -> None:
        suppressed = argparse.SUPPRESS  # leaves no attribute in the namespace
        super().__init__(option_strings, dest, nargs=0, const=const, default=suppressed, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        try:
            print(self.const(), flush=True)
        except BrokenPipeError:  # closed by its reader; the flush at exit must not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit()


def answer_help(parsers: Mapping[str, MakeParser], command: str, words: Sequence[str]) -> None:
    """Answer ``--help`` before the command's slow imports; otherwise do nothing."""
    if command in parsers and any(word in ANSWERED for word in words):
        parsers[command]().parse_args([word for word in words if word in ANSWERED])


def take_pairs(words: Sequence[str], keys: Collection[str]) -> tuple[list[str], list[str]]:
    """Extract ``KEY VALUE`` pairs from the arguments of a command whose options take lists.

    Otherwise an option such as ``--seeds 0 1`` would swallow the arguments that follow it. Anything
    after a ``--`` is left to the parser.

    Args:
        words: command-line arguments.
        keys: the keys without a dot; directly after an option, such a word is the option's value.

    Returns:
        The remaining words, and the pairs as a flat list.
    """
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    others, pairs, position = [], [], 0
    while position < end:
        word = words[position]
        behind_option = position > 0 and words[position - 1].startswith("--")
        if DOTTED_KEY.fullmatch(word) or (word in keys and not behind_option):
            pairs += words[position : min(position + 2, end)]
            position += 2
        else:
            others.append(word)
            position += 1
    return [*others, *words[end:]], pairs
