"""Data and models of a command line: a configuration file, or a folder and model names."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from pcka.engine.config import ConfigError
from pcka.engine.launch import is_first

logger = logging.getLogger("pcka")


def pair_settings(
    given: argparse.Namespace, overrides: Sequence[str], method: str = ""
) -> tuple[Path | dict[str, object], str]:
    """Return the data and models of a command line, and the method.

    Args:
        given: ``config_file``, or instead ``data``, ``student``, ``teacher`` and ``weights``.
        overrides: its ``KEY VALUE`` pairs.
        method: name of a method; with ``data``, "" is the recommended one or, without a teacher,
            the baseline.

    Raises:
        ConfigError: both or neither are given, or as :func:`propose`.
    """
    proposed = {"--data": given.data, "--student": given.student}
    also = {"--teacher": given.teacher, "--weights": given.weights}
    named = [option for option, value in (proposed | also).items() if value]
    if given.config_file:
        if named:
            raise ConfigError(
                f"{', '.join(named)}: replace --config-file; give one or the other, and override a "
                "file's values with KEY VALUE pairs, such as TEACHER.WEIGHTS F"
            )
        return Path(given.config_file), method
    if missing := [option for option, value in proposed.items() if not value]:
        raise ConfigError(
            f"{' and '.join(missing)}: expected --config-file F (--list prints the available "
            "ones), or --data FOLDER --student NAME --teacher NAME"
        )
    if given.weights and not given.teacher:
        raise ConfigError("--weights: is the teacher's checkpoint; name its model with --teacher")
    from classification.first_run import BASELINE, DEFAULT_METHOD, propose

    method = method or (DEFAULT_METHOD if given.teacher else BASELINE)
    proposal = propose(
        given.data,
        given.student,
        teacher=given.teacher,
        weights=given.weights,
        method=method,
        overrides=overrides,
    )
    if is_first():
        # A comparison has its own methods.
        chosen = [f"method: {method} (--method M; --list prints them)"] * ("method" in given)
        for note in (*proposal.notes, *chosen):
            logger.info(note)
    return proposal.settings, method
