from __future__ import annotations

import pytest
import torch

from benchmarks import teacher_outputs


@pytest.mark.slow
def test_a_step_from_disk_stands_beside_one_of_the_running_teacher(capsys):
    threads = str(torch.get_num_threads())  # which the script sets for the whole process
    words = ["--rounds", "2", "--images", "128", "--threads", threads]
    seconds = teacher_outputs.main(words)
    assert {name: len(times) for name, times in seconds.items()} == {
        "live": 2, "from disk": 2, "cross-entropy": 2
    }  # fmt: skip
    assert "| from disk |" in capsys.readouterr().out
