from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.utils.events import EventStorage

from benchmarks import detection_step
from detection.config import PROJECT


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
def test_a_tiny_step_is_timed_and_its_memory_measured(capsys, tmp_path):
    threads = torch.get_num_threads()
    given = ["--quick", "--batch", "2", "3", "--methods", "PKD", "--output", str(tmp_path)]
    try:
        two, three = detection_step.main([*given, "--autocast", "bfloat16"])
    finally:
        torch.set_num_threads(threads)
    for found in (two, three):
        assert list(found["steps"]) == ["student step", "teacher forward", "PKD"]
        assert all(len(step["ms"]) == 1 for step in found["steps"].values())
    peaks = {name: step["peak_bytes"] for name, step in two["steps"].items()}
    # The student keeps its activations for the backward pass, the teacher does not.
    assert 0 < peaks["teacher forward"] < peaks["student step"]
    assert "beyond the student's step (MiB)" in capsys.readouterr().out
    written = json.loads((tmp_path / "detection_step.json").read_text())
    assert [entry["batch"] for entry in written["records"]] == [2, 3]
    assert written["summary"][0].startswith("160 x 192, batch 2: student ")


def test_the_summary_gives_each_method_its_share_of_the_step():
    steps = {"student step": [60.0], "teacher forward": [30.0], "PKD": [100.0]}
    entry = {"size": "8 x 8", "batch": 2, "steps": {n: {"ms": ms} for n, ms in steps.items()}}
    (line,) = detection_step._summary(entry)
    assert line.endswith("student 60.0 ms, teacher 30.0 ms, with PKD 100.0 ms (10.0 % its own)")


def test_the_models_run_under_autocast_where_it_is_asked_for():
    model, losses = detection_step._build(
        str(detection_step.CONFIG), ["PCKA"], detection_step.TINY, "cpu"
    )
    seen = []
    model.student.backbone.register_forward_hook(lambda _, __, out: seen.append(out["p3"].dtype))
    batch = detection_step.random_batch(2, 128, 128)
    with EventStorage():
        for autocast in (None, "bfloat16"):
            detection_step._steps(model, losses, batch, autocast)["PCKA"]()
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.slow
def test_the_step_of_a_sum_is_measured_beside_the_teacher_with_its_head(capsys):
    threads = torch.get_num_threads()
    file = str(PROJECT / "configs/detection/bccd/crosskd.yaml")
    given = ["--config-file", file, "--short-side", "64", "--long-side", "64", "--rounds", "1"]
    try:
        (found,) = detection_step.main([*given, "--methods", "CROSSKD", "PCKA+CROSSKD"])
    finally:
        torch.set_num_threads(threads)
    assert list(found["steps"]) == ["student step", "teacher forward", "CROSSKD", "PCKA+CROSSKD"]
    with pytest.raises(SystemExit):
        detection_step.main([*given, "--methods", "PCKA", "CROSSKD"])
    assert "that read the teacher's head in a call of their own" in capsys.readouterr().err
