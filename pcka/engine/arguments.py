"""The parsers of commands: quick to import, so that ``--help`` is answered at once."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

# In capitals throughout, as methods, numbers and files (MODEL.pth) are not.
DOTTED_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z][A-Z0-9_]*)+")
ANSWERED = ("-h", "--help", "--list")  # what needs nothing of a command but its parser

MakeParser = Callable[[], argparse.ArgumentParser]


def command_parser(description: str, *examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help ends with examples, and that takes ``--debug``."""
    shown = "\n".join(f"  {line}" for example in examples for line in example.splitlines())
    parser = argparse.ArgumentParser(
        description=textwrap.fill(description, 78),
        epilog=f"for example:\n{shown}" if shown else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parser


def add_runs(parser: argparse.ArgumentParser, *, seeds: Sequence[int], output: str) -> None:
    """Add ``--seeds`` and ``--output`` of a command that compares runs, with their defaults."""
    shown = " ".join(map(str, seeds))
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=list(seeds),
        metavar="S",
        help=f"of the students (default: {shown})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(output),
        metavar="DIR",
        help="folder of the runs and the table (default: %(default)s)",
    )


def positive(text: str) -> int:
    """The type of an option that takes a number of things."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


class Answer(argparse.Action):
    """An option that prints a text and ends, as ``--help`` does; ``const`` makes the text."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, const: Callable[[], str], help: str
    ) -> None:
        suppressed = argparse.SUPPRESS  # of what is parsed
        super().__init__(option_strings, dest, nargs=0, const=const, default=suppressed, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        try:
            print(self.const(), flush=True)
        except BrokenPipeError:  # its reader has seen enough, and the end is not to write again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit()


def answer_help(parsers: Mapping[str, MakeParser], command: str, words: Sequence[str]) -> None:
    """Answer ``--help`` before what takes a command seconds to import; else do nothing."""
    if command in parsers and any(word in ANSWERED for word in words):
        parsers[command]().parse_args([word for word in words if word in ANSWERED])


def take_pairs(words: Sequence[str], keys: Collection[str]) -> tuple[list[str], list[str]]:
    """Take ``KEY VALUE`` pairs from among the words of a command whose options take lists.

    Without that an option such as ``--seeds 0 1`` would swallow what follows it. What stands
    behind a ``--`` is left to the parser.

    Args:
        words: of the command line.
        keys: those without a dot; directly behind an option such a word is its value.

    Returns:
        The other words, and the pairs one after the other.
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
