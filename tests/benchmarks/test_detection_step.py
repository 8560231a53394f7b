from __future__ import annotations

import sys

import pytest

pytest.importorskip("detectron2")

from benchmarks import detection_step

R18 = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
TINY = [
    *R18, "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.RETINANET.NUM_CLASSES", "80",
    "DISTILL.TEACHER.OPTS", str([R18[0], 18, R18[2], 64, "MODEL.FPN.OUT_CHANNELS", 16]),
]  # fmt: skip


def test_the_table_has_time_and_memory_of_each_method():
    times = {"student step": [10.0, 20.0], "teacher forward": [10.0, 5.0], "PKD": [30.0, 30.0]}
    mib = 1 << 20
    peaks = {"student step": 100 * mib, "teacher forward": 40 * mib, "PKD": 107 * mib}
    rows = detection_step._table(times, peaks).splitlines()
    # Round by round 30 / 20 and 30 / 25.
    assert rows[-1] == "| PKD | 30 | 1.350 | 107 | 7 |"
    assert rows[2] == "| student step | 15 | 0.650 | 100 |  |"
    assert detection_step._table(times, {}).splitlines()[-1] == "| PKD | 30 | 1.350 |"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_tiny_step_is_timed_and_its_memory_measured(capsys):
    size = ["--short-side", "160", "--long-side", "192", "--rounds", "1"]
    found = detection_step.main([*size, "--methods", "PKD", "--opts", *TINY])
    assert list(found) == ["student step", "teacher forward", "PKD"]
    assert all(len(record["ms"]) == 1 for record in found.values())
    peaks = {name: record["peak_bytes"] for name, record in found.items()}
    # The student keeps its activations for the backward pass, the teacher does not.
    assert 0 < peaks["teacher forward"] < peaks["student step"]
    assert "beyond the student's step (MiB)" in capsys.readouterr().out
