"""The ``pcka`` command: its subcommands belong to the trainers, in a clone of the repository."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# Subcommand -> module whose ``main`` it runs, and what it does. A star stands for the trainer that
# the configuration file, or the one in the run's folder, is for.
COMMANDS = {
    "cka": ("classification.cka_map", "CKA of all layers of two classifiers"),
    "epochs": ("classification.epochs", "how a classifier's stages developed over its run"),
    "grams": ("*.grams", "Grams of teacher and student, for any run"),
    "report": ("*.report", "the results of a run, as a page"),
    "doctor": ("*.doctor", "check that machine and configuration can train"),
}


def main(arguments: Sequence[str] | None = None) -> object:
    """Run the subcommand named by the first argument and return its result.

    Raises:
        ImportError: a package that it needs is not installed.
    """
    width = max(map(len, COMMANDS))
    about = "\n".join(f"  {name:{width}s}  {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="pcka",
        description=f"commands (for details: pcka COMMAND --help):\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    given = parser.parse_args(arguments)
    return _imported(module_of(given.command, given.arguments)).main(given.arguments)


def module_of(command: str, arguments: Sequence[str]) -> str:
    """Return the module of a subcommand, depending on the configuration that its arguments name.

    Raises:
        ConfigError: the file is not for any trainer.
    """
    name, _ = COMMANDS[command]
    if "*" not in name or (file := _configuration(arguments)) is None:
        return name.replace("*", "classification")
    return name.replace("*", _imported("pcka.engine.trainers").trainer_of(file, arguments))


def _configuration(arguments: Sequence[str]) -> Path | None:
    """The file given by ``--config-file``, or the one in a run's folder."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-file", type=Path, nargs="?")  # the command refuses it empty
    if file := parser.parse_known_args(arguments)[0].config_file:
        return file
    of_folders = (Path(word, "config.yaml") for word in arguments)
    return next((file for file in of_folders if file.is_file()), None)


def script() -> NoReturn:
    """Run the command and exit with its status; see :func:`pcka.engine.command.run_command`."""
    try:
        from pcka.engine.command import run_command  # its dependencies may be missing
    except ModuleNotFoundError as error:
        sys.exit(f"error: {_lacking(error)}")
    run_command(main)


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
        f"pcka: no module named {error.name!r}; the commands are part of the trainers: run "
        "pip install -e '.[train]' in a clone of the repository"
    )


if __name__ == "__main__":
    script()
