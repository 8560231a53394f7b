from __future__ import annotations

import json

import pytest

from classification.config import ConfigError
from classification.run_files import RunFiles, read_metrics
from pcka.folder_lock import FolderInUseError


@pytest.mark.parametrize("trace", ["checkpoint.pth", "metrics.jsonl", "result.json"])
def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path, trace):
    (tmp_path / trace).write_text("precious")
    with pytest.raises(ConfigError, match=f"holds a run .{trace}.; continue it with --resume"):
        RunFiles(tmp_path, resume=False)
    assert (tmp_path / trace).read_text() == "precious"
    with RunFiles(tmp_path, resume=True):
        pass


def test_a_folder_that_another_run_works_in_is_refused(tmp_path):
    with (
        RunFiles(tmp_path, resume=True),
        pytest.raises(FolderInUseError, match="another process is at work"),
    ):
        RunFiles(tmp_path, resume=True)
    with RunFiles(tmp_path, resume=True):
        pass


def test_metrics_are_cut_back_and_a_torn_line_is_left_out(tmp_path):
    lines = [json.dumps({"epoch": epoch, "accuracy": epoch}) for epoch in (1, 2, 3)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(lines) + '\n{"epoch": 4, "acc')
    with RunFiles(tmp_path, resume=True) as files:
        files.start_metrics(2)
        files.add_metrics({"epoch": 3, "accuracy": 30})
    assert metrics.read_text().endswith("\n")
    assert [record["accuracy"] for record in read_metrics(metrics)] == [1, 2, 30]
