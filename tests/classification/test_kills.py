"""A training that is killed a hundred times, at any moment: no complete epoch is trained twice."""

from __future__ import annotations

import re

import pytest

from pcka.files import load_file

KILLS = 100

# Imports once and forks the trainings, which would need seconds each to start by themselves.
# argv: number of kills, seed, arguments of train.py.
SCRIPT = """
import os
import random
import signal
import sys
import time
import traceback

from classification.data import digits  # what a run imports when it is named
from classification.models import resnet_cifar
from classification.train import main
from pcka.losses import CE, MGD

kills, seed, *words = sys.argv[1:]
moments = random.Random(int(seed))


def started():
    child = os.fork()
    if child == 0:
        try:
            main(words)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


for _ in range(int(kills)):
    child = started()
    time.sleep(moments.uniform(0, 2))
    ended, status = os.waitpid(child, os.WNOHANG)
    assert ended == 0, f"ended by itself: {status}"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
if not int(kills):
    _, status = os.waitpid(started(), 0)
    assert status == 0
"""


@pytest.mark.slow
def test_a_hundred_kills_lose_no_epoch(
    start, digits_config, tiny_overrides, random_teacher, tmp_path, assert_same_run
):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def train(kills, folder, epochs):
        keys = {"SOLVER.SCHEDULE": "multistep", "SOLVER.MILESTONES": "[3]", "SOLVER.EPOCHS": epochs}
        keys |= {"TEACHER.WEIGHTS": random_teacher, "OUTPUT_DIR": folder}
        words = ["--config-file", digits_config, "--method", "mgd", "--resume"]
        program = start(script, kills, 0, *words, *tiny_overrides(**keys))
        assert program.wait(3000) == 0, program.log.read_text()[-5000:]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    train(KILLS, killed, 1_000_000)
    reached = load_file(killed / "checkpoint.pth")["epoch"]
    assert reached > 3  # it came on between the kills
    told = [int(epoch) for epoch in re.findall(r"epoch (\d+)/", (killed / "log.txt").read_text())]
    assert told == sorted(set(told))  # what was complete, and told, was never trained again
    # The same to the last digit, and nothing half written is left.
    train(0, killed, reached + 1)
    train(0, whole, reached + 1)
    assert_same_run(killed, whole)
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in killed.iterdir()} == names
