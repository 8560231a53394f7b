from __future__ import annotations

import json
import math
import re
import subprocess
from types import SimpleNamespace

import pytest

from detection import compare, train_net
from detection.config import load_config
from pcka.engine.config import ConfigError

AP = {
    "student": {0: 20.0, 1: 24.0, 2: 22.0},
    "pcka": {0: 25.0, 1: 29.5, 2: 26.5},
    "mimic": {0: 24.0, 1: 20.0, 2: 23.0},
}


SEGM = {"AP": 1.0, "AP50": 2.0, "AP75": 3.0}


def compared(change=lambda run, seed, metrics: None):
    """The comparison of :data:`AP`, once ``change`` has seen each run's metrics."""
    made = compare.empty_comparison(list(AP))
    for run, by_seed in AP.items():
        for seed, ap in by_seed.items():
            metrics = {"bbox": {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2, "APl": 0.0}}
            change(run, seed, metrics)
            compare.add(made, run, seed, metrics)
    return made


def test_segmenters_are_compared_by_their_pixels():
    made = compare.empty_comparison(["student", "kd"])
    for run, values in {"student": (20.0, 24.0), "kd": (25.0, 29.5)}.items():
        for seed, value in enumerate(values):
            found = {"mIoU": value, "mACC": 50.0, "pACC": 90.0, "IoU-a": 1.0, "fwIoU": 2.0}
            compare.add(made, run, seed, {"sem_seg": found})
    student, kd = made.rows()
    assert list(student) == [
        "run", "seeds", "mIoU", "mACC", "pACC", "mIoU minus first row", "difference",
    ]  # fmt: skip
    assert (student["mIoU"], kd["mIoU minus first row"]) == ("22.00 ± 2.83", "+5.25 ± 0.35")


@pytest.fixture
def files(tmp_path):
    """Two configurations."""
    paths = []
    for name in ("student", "pcka"):
        path = tmp_path / f"{name}.yaml"
        path.write_text("VERSION: 2\nDATASETS: {TEST: [some_set]}\n")
        paths.append(path)
    return paths


@pytest.fixture
def trainings(monkeypatch):
    """The commands of the trainings, which write what a run leaves, but fail with seed 13."""
    commands, as_it_is = [], subprocess.run

    def run(command, **keywords):
        if command[0] == "git":  # of the report, which says what it was made with
            return as_it_is(command, **keywords)
        commands.append(command)
        config, *keys = command[command.index("--config-file") + 1 :]
        cfg = load_config(config, keys)
        folder = compare.Path(cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(cfg.dump())
        metrics = dict.fromkeys(("AP", "AP50", "AP75"), 10.0 + cfg.SEED)
        if cfg.SEED != 13:
            (folder / "result.json").write_text(json.dumps({"bbox": metrics}))
        return SimpleNamespace(returncode=int(cfg.SEED == 13))

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_table_has_spread_and_paired_differences():
    student, pcka, mimic = compared().rows()
    assert list(student) == [
        "run", "seeds", "AP", "AP50", "AP75", "AP minus first row", "difference",
    ]  # fmt: skip
    assert list(student.values()) == [
        "student", "3", "22.00 ± 2.00", "44.00 ± 4.00", "11.00 ± 1.00", "", "",
    ]  # fmt: skip
    assert pcka["AP"] == "27.00 ± 2.29"
    assert list(pcka.values())[-2:] == ["+5.00 ± 0.50", "above"]
    assert list(mimic.values())[-2:] == ["+0.33 ± 4.04", "not shown"]


def test_masks_have_columns_where_every_run_has_them():
    def with_masks(run, seed, metrics):
        metrics["segm"] = SEGM

    def with_few_masks(run, seed, metrics):
        if (run, seed) != ("pcka", 1):
            metrics["segm"] = SEGM

    columns = list(compared(with_masks).rows()[0])
    assert columns[2:8] == ["AP", "AP50", "AP75", "segm AP", "segm AP50", "segm AP75"]
    assert "segm" not in compared(with_few_masks).markdown()


def test_the_report_has_the_table_the_curves_and_the_classes(files, trainings, tmp_path):
    compare.compare(files, [3, 4], tmp_path)
    for number, name in enumerate(("student", "pcka")):
        for seed in (3, 4):
            folder, ap = tmp_path / name / f"seed{seed}", 10.0 + seed + number
            metrics = {"AP": ap, "AP50": ap, "AP75": ap, "AP-cat": 2 * ap, "AP-dog": None}
            (folder / "result.json").write_text(json.dumps({"bbox": metrics}))
            lines = [
                {"iteration": step, "bbox/AP": ap * step, "cka/p3": ap / 20} for step in (1, 2)
            ]
            (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    comparison = compare.compare(files, [3, 4], tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["rows"] == comparison.rows()
    assert data["cka"] == {"student": {"p3": 0.65}, "pcka": {"p3": 0.7}}
    assert data["metrics"]["pcka"]["bbox"]["AP-cat"] == 28.0
    page = (tmp_path / "report.html").read_text()
    for text in ("2 detectors on some_set", "bbox/AP, mean over seeds", "bbox AP", "0.650"):
        assert text in page
    compare.compare(files, [3, 4], tmp_path / "quiet", ["REPORT", "False"])
    assert not (tmp_path / "quiet" / "report.html").exists()


def test_what_is_missing_is_trained_and_the_rest_is_kept(files, trainings, tmp_path):
    compare.compare(files, [3], tmp_path / "out", ["SOLVER.MAX_ITER", "7"])
    launcher = ("torchrun", "--nproc-per-node", "2")
    keys = ["SOLVER.MAX_ITER", "7"]
    comparison = compare.compare(files, [3, 4], tmp_path / "out", keys, launcher=launcher)
    results = comparison.results
    assert {run: sorted(by_seed) for run, by_seed in results.items()} == {
        "student": [3, 4],
        "pcka": [3, 4],
    }
    assert results["pcka"][4]["AP"] == 14.0
    assert len(trainings) == 4
    assert tuple(trainings[-1][:3]) == launcher
    assert "--resume" in trainings[-1]
    table = (tmp_path / "out" / "comparison.csv").read_text().splitlines()
    assert table[0] == "run,seed,AP,AP50,AP75"
    assert table[1:] == [f"{run},{s},{10.0 + s},{10.0 + s},{10.0 + s}" for run in results
                         for s in (3, 4)]  # fmt: skip
    assert (tmp_path / "out" / "comparison.md").read_text() == comparison.markdown()
    assert (tmp_path / "out" / "comparison.png").exists()


def test_runs_with_other_settings_are_not_taken_for_these(files, trainings, tmp_path):
    compare.compare(files, [0], tmp_path / "out", ["SOLVER.STEPS", "[5]"])
    with pytest.raises(ConfigError, match=r"student/seed0: .* other values of SOLVER.MAX_ITER"):
        keys = ["SOLVER.STEPS", "[5]", "SOLVER.MAX_ITER", "9", "MODEL.DEVICE", "cpu"]
        compare.compare(files, [0], tmp_path / "out", keys)


def test_the_folder_of_a_run_is_refused(files, trainings, tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"--output: .* holds a run; give a comparison another"):
        compare.compare(files, [0], tmp_path)


def test_names_must_differ(files, tmp_path):
    with pytest.raises(ConfigError, match=r"different names, got .*student.yaml"):
        compare.compare([files[0], files[0]], [0], tmp_path)


def test_a_training_that_failed_is_named_and_may_start_anew_otherwise(files, trainings, tmp_path):
    for steps in ("5", "6"):
        with pytest.raises(RuntimeError, match=r"student/seed13' failed; see the error"):
            compare.compare(files, [13], tmp_path, ["SOLVER.MAX_ITER", steps])
    (tmp_path / "student" / "seed13" / "last_checkpoint").write_text("model_0000004.pth")
    with pytest.raises(ConfigError, match=r"other values of SOLVER.MAX_ITER"):
        compare.compare(files, [13], tmp_path, ["SOLVER.MAX_ITER", "7"])


@pytest.mark.parametrize("sets", ["()", "('a', 'b')"])
def test_more_or_less_than_one_test_set_is_refused(files, tmp_path, sets):
    with pytest.raises(ConfigError, match=r"DATASETS.TEST: expected one set"):
        compare.compare(files, [0], tmp_path, ["DATASETS.TEST", sets])


@pytest.mark.parametrize("key", ["DATASETS.TEST", "DATASETS.COCO_TEST.NAME"])
def test_results_on_other_images_are_not_taken_for_these(files, trainings, tmp_path, key):
    one, other = ("('a',)", "('b',)") if key == "DATASETS.TEST" else ("a", "b")
    compare.compare(files, [0], tmp_path, ["DATASETS.TEST", "('x',)", key, one])
    with pytest.raises(ConfigError, match=f"other values of .*{key}"):
        compare.compare(files, [0], tmp_path, ["DATASETS.TEST", "('x',)", key, other])


def test_the_command_line_may_hold_overrides_after_the_lists(files, trainings, tmp_path, capsys):
    words = ["--config-files", *map(str, files), "--seeds", "1", "--output", str(tmp_path / "out")]
    compare.main([*words, "--launcher", "torchrun --nnodes 2", "--", "SOLVER.MAX_ITER", "7"])
    assert trainings[0][:3] == ["torchrun", "--nnodes", "2"]
    assert "SOLVER.MAX_ITER" in trainings[0]
    assert "unknown (one seed)" in capsys.readouterr().out


def test_the_command_line_may_not_set_the_seed_or_the_folder(files, trainings, tmp_path):
    words = ["--config-files", *map(str, files), "--output", str(tmp_path / "out")]
    for key, option in (("SEED", "--seeds"), ("OUTPUT_DIR", "--output")):
        with pytest.raises(ConfigError, match=f"{key}: each run has its own; use {option} instead"):
            compare.main([*words, key, "5"])
    assert not trainings


def test_runs_without_figures_of_a_task_in_common_are_refused():
    def of_another_task(run, seed, metrics):
        if (run, seed) == ("pcka", 0):
            metrics["box_proposals"] = {"AR@100": metrics.pop("bbox")["AP"]}

    with pytest.raises(ConfigError, match=r"DATASETS.TEST: no AP, .* is the set annotated"):
        compared(of_another_task)


def test_a_training_that_failed_is_listed_and_the_others_go_on(files, trainings, tmp_path):
    comparison = compare.compare(files, [13, 3], tmp_path / "out")
    assert [row["seeds"] for row in comparison.rows()] == ["1 (1 failed)"] * 2
    assert len(trainings) == 4
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert re.search(r"\npcka, seed 13: the training in '.*pcka/seed13' failed", text)


@pytest.mark.parametrize("content", ["", "[1]", '{"bbox": 3}'])
def test_a_damaged_result_is_named(files, trainings, tmp_path, content):
    compare.compare(files, [0], tmp_path)
    (tmp_path / "student" / "seed0" / "result.json").write_text(content)
    with pytest.raises(ConfigError, match=r"student/seed0/result.json: .*remove it"):
        compare.compare(files, [0], tmp_path)


def test_what_could_not_be_computed_is_written_as_null_and_read_as_nan(tmp_path):
    train_net.write_result({"bbox": {"AP": 1.5, "APl": math.nan}}, tmp_path / "result.json")
    assert "null" in (tmp_path / "result.json").read_text()
    read = compare._read_result(tmp_path / "result.json")["bbox"]
    assert read["AP"] == 1.5
    assert math.isnan(read["APl"])
