from __future__ import annotations

import json

import pytest

from pcka.engine.config import ConfigError
from pcka.engine.folder_lock import FolderInUseError
from pcka.engine.run_folder import RunFolder, read_metrics, remove_temporaries


@pytest.mark.parametrize("trace", ["checkpoint.pth", "metrics.jsonl", "result.json"])
def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path, trace):
    (tmp_path / trace).write_text("precious")
    with pytest.raises(ConfigError, match=f"holds a run .{trace}.; continue it with --resume"):
        RunFolder(tmp_path, resume=False)
    assert (tmp_path / trace).read_text() == "precious"
    with RunFolder(tmp_path, resume=True):
        pass


def test_a_folder_that_another_run_works_in_is_refused(tmp_path):
    with (
        RunFolder(tmp_path, resume=True),
        pytest.raises(FolderInUseError, match="another process is using"),
    ):
        RunFolder(tmp_path, resume=True)
    with RunFolder(tmp_path, resume=True):
        pass


def test_metrics_are_cut_back_and_a_torn_line_is_left_out(tmp_path):
    lines = [json.dumps({"epoch": epoch, "accuracy": epoch}) for epoch in (1, 2, 3)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(lines) + '\n{"epoch": 4, "acc')
    with RunFolder(tmp_path, resume=True) as files:
        files.start_metrics(2)
        files.add_metrics({"epoch": 3, "accuracy": 30})
    assert metrics.read_text().endswith("\n")
    assert [record["accuracy"] for record in read_metrics(metrics)] == [1, 2, 30]


@pytest.mark.parametrize("line", ["{", "[1]", "\0\0\0", '{"epoch": }', "{}", '{"epoch": null}'])
def test_a_damaged_line_of_the_metrics_is_named(tmp_path, line):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(f'{{"epoch": 1}}\n{line}\n{{"epoch": 3}}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl': line 2 is damaged; remove that line"):
        read_metrics(metrics)


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_else(tmp_path):
    left = [".checkpoint.pth.0123abcd.tmp", ".config.yaml.ffffffff.tmp"]
    kept = [".mine.tmp", "checkpoint.pth.0123abcd.tmp", ".x.0123ABCD.tmp"]
    for name in (*left, *kept):
        (tmp_path / name).touch()
    with RunFolder(tmp_path, resume=True):
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {*kept, "log.txt"}
    (tmp_path / ".a.pth.01234567.tmp").touch()
    (tmp_path / ".b.pth.01234567.tmp").touch()
    remove_temporaries(tmp_path, "a.pth")
    assert {path.name for path in tmp_path.glob(".?.pth*")} == {".b.pth.01234567.tmp"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"OUTPUT_DIR: the folder cannot be created: .*file"):
            RunFolder(path, resume=False)


def test_traces_are_what_only_a_first_checkpoint_leaves(tmp_path):
    with RunFolder(tmp_path, resume=True) as files:
        files.start_metrics(0)
        files.add_metrics({"epoch": 1})
        (tmp_path / "model_last.pth").touch()
        assert files.traces() == []
        files.add_metrics({"epoch": 2})
        (tmp_path / "model_best.pth").touch()
        files.write_json("result.json", {})
        assert files.traces() == ["result.json", "model_best.pth", "metrics.jsonl"]


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_result_counts_as_none(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with RunFolder(tmp_path, resume=True) as files:
        assert files.read_result() is None
