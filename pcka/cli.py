"""The command ``pcka``: its subcommands are the trainers' own, in a clone of the repository."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# Subcommand -> module whose ``main`` it is, and what it does.
COMMANDS = {
    "cka": ("classification.cka_map", "CKA of all layers of two classifiers"),
    "epochs": ("classification.epochs", "how the stages of a classifier came to be, over its run"),
    "grams": ("classification.grams", "Grams of teacher and student, of a run of either kind"),
    "report": ("classification.report", "what came of a classifier's run, as a page"),
    "doctor": ("classification.doctor", "will this machine, and this configuration, train?"),
}
OF_DETECTORS = {"grams": "detection.grams"}  # subcommand -> module, where it is of such a run


def main(arguments: Sequence[str] | None = None) -> object:
    """Run the subcommand that the arguments begin with; return what it returns.

    Raises:
        ImportError: what it needs is not installed.
    """
    width = max(map(len, COMMANDS))
    about = "\n".join(f"  {name:{width}s}  {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="pcka",
        description=f"commands (pcka COMMAND --help has the rest):\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    given = parser.parse_args(arguments)
    module = COMMANDS[given.command][0]
    if given.command in OF_DETECTORS and any(map(_is_detector, given.arguments)):
        module = OF_DETECTORS[given.command]
    return _imported(module).main(given.arguments)


def script() -> NoReturn:
    """Run the command to its exit status, see :func:`pcka.engine.command.run_command`."""
    try:
        from pcka.engine.command import run_command  # what it needs may be missing
    except ModuleNotFoundError as error:
        sys.exit(f"error: {_lacking(error)}")
    run_command(main)


def _is_detector(word: str) -> bool:
    """Whether a word is the folder of a detector's run."""
    try:
        return "META_ARCHITECTURE" in Path(word, "config.yaml").read_text()
    except (OSError, ValueError):
        return False


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(_lacking(error)) from error


def _lacking(error: ModuleNotFoundError) -> str:
    if error.name == "detectron2":
        return (
            "pcka: detectors need detectron2; run pip install -e '.[detection]' in a clone of the "
            "repository, then python tools/install_detectron2.py"
        )
    return (
        f"pcka: there is no module {error.name!r}; the commands are part of the trainers: run "
        "pip install -e '.[train]' in a clone of the repository"
    )


if __name__ == "__main__":
    script()
