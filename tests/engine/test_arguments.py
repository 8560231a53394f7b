from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pcka.engine.arguments import answer_help, command_parser, take_pairs


@pytest.mark.parametrize(
    ("words", "others", "pairs"),
    [
        (["--methods", "a", "SOLVER.EPOCHS", "1"], ["--methods", "a"], ["SOLVER.EPOCHS", "1"]),
        (["SEED", "1", "--seeds", "0"], ["--seeds", "0"], ["SEED", "1"]),
        (["--output", "SEED", "A.B", "C.D"], ["--output", "SEED"], ["A.B", "C.D"]),
        (["--methods", "a", "DISTILL.TAPS"], ["--methods", "a"], ["DISTILL.TAPS"]),
        (["--f", "my.yaml", "--", "A.B", "1"], ["--f", "my.yaml", "--", "A.B", "1"], []),
        (["--weights", "M.pth", "A.B", "1"], ["--weights", "M.pth"], ["A.B", "1"]),
        (["A.B", "--", "A.B", "1"], ["--", "A.B", "1"], ["A.B"]),
    ],
)
def test_pairs_are_taken_from_among_other_words(words, others, pairs):
    assert take_pairs(words, {"SEED"}) == (others, pairs)


def test_help_is_answered_and_everything_else_is_left_alone(capsys):
    parsers = {"train": lambda: command_parser("Trains.", "train.py A 1")}
    for command, words in (("train", ["A", "1"]), ("other", ["--help"])):
        answer_help(parsers, command, words)
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as end:
        answer_help(parsers, "train", ["A", "--help", "1"])
    assert end.value.code == 0
    assert capsys.readouterr().out.endswith("for example:\n  train.py A 1\n")


ANSWERING = """
import argparse
from pcka.engine.arguments import Answer
parser = argparse.ArgumentParser()
parser.add_argument("--list", action=Answer, const=lambda: "a name\\n" * 100_000, help="names")
parser.parse_args(["--list"])
"""


def test_a_reader_of_an_answer_may_stop_in_its_middle():
    """As ``| head`` does."""
    reading, writing = os.pipe()
    program = subprocess.Popen(
        [sys.executable, "-c", ANSWERING], stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    _, told = program.communicate()
    assert (program.returncode, told) == (0, b"")
