"""The paper's tables as runs: what is listed, trained, collected and refused."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from classification.config import load_config
from pcka.engine.command import TrainingFailedError
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import RunFolder
from tools import reproduce
from tools.paper import classifiers, collect, estimate
from tools.paper.classifiers import Classifiers
from tools.paper.steps import classifiers_step
from tools.paper.table import TABLES, TORCHRUN, Plan, State, Step, load_table

RECIPE = """
DEVICE: cpu
DATA: {NAME: digits, IMAGE_SIZE: 16, HOLDOUT: 40, TRAIN_IMAGES: 40, CROP_PADDING: 0, FLIP: false}
SOLVER: {EPOCHS: 2, BATCH_SIZE: 10, SCHEDULE: multistep, MILESTONES: [1]}
"""
PAIR = "_BASE_: base.yaml\nTEACHER: {NAME: resnet8}\nSTUDENT: {NAME: %s}\n"
TABLE = """
TITLE: Digits
TASK: classification
COLUMNS: [top-1]
SEEDS: [0, 1]
GPUS: 1
IMAGES: 400
CLASSES: 10
CONFIGS: .
PAIRS: {small: small.yaml, large: large.yaml}
TEACHERS: {TRAINED_BY: base.yaml, FILES: {resnet8: resnet8_vanilla/ckpt.pth}}
METHODS: {ce: [50.0, 51.0], kd: [52.5, null], crd: [53.0, 54.0]}
NOT_HERE: {DPK: [60.0, null]}
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Sums in one order, and no curves, which take longer than their training."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("classification.run.plot_curves", lambda *_: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def table(tmp_path) -> Path:
    """A table of two pairs on 40 digits."""
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "base.yaml").write_text(RECIPE)
    (folder / "small.yaml").write_text(PAIR % "resnet8")
    (folder / "large.yaml").write_text(PAIR % "resnet14")
    (folder / "digits.yaml").write_text(TABLE)
    return folder / "digits.yaml"


@pytest.fixture
def call(table, tmp_path, capsys):
    """``call(*words)``: what the command prints of that table."""

    def run(*words: str) -> str:
        capsys.readouterr()
        reproduce.main([str(table), "--output", str(tmp_path / "out"), *words])
        return capsys.readouterr().out

    return run


@pytest.fixture
def plan(table, tmp_path):
    """``plan(**changes)``: all of that table."""

    def make(**changes: object) -> Plan:
        loaded = load_table(str(table))
        values = {
            "table": loaded, "output": tmp_path / "out" / "digits", "pairs": loaded.pairs,
            "methods": loaded.methods, "seeds": (0, 1), "gpus": 1, "together": 8,
        }  # fmt: skip
        return Plan(**{**values, **changes})

    return make


def cells(text: str) -> list[list[str]]:
    """The words of a list's or a table's lines."""
    return [[word.strip() for word in line.strip("|").split("|")] for line in text.splitlines()]


def states(text: str) -> dict[str, str]:
    """ "pair method" -> states, of what ``--list`` prints."""
    lines = (line.split(maxsplit=2) for line in text.splitlines()[2:] if "  " in line)
    return {f"{pair} {method}": " ".join(rest.split()) for pair, method, rest in lines}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_every_row_of_a_table_of_classifiers_has_a_configuration(name):
    shipped = load_table(name)
    for pair in shipped.pairs:
        for method in shipped.methods:
            cfg = load_config(shipped.config_file(pair, method), [], method)
            assert cfg.TEACHER.NAME in shipped.keys["TEACHERS"]["FILES"]
    assert load_config(shipped.config_file(pair, "ce")).SOLVER.EPOCHS in (240, 100)


def test_every_row_of_the_table_of_detectors_has_a_configuration():
    detection_config = pytest.importorskip("detection.config")
    shipped = load_table("table3")
    for pair in shipped.pairs:
        for method in shipped.methods:
            cfg = detection_config.load_config(str(shipped.config_file(pair, method)), [])
            assert cfg.DISTILL.METHODS[1:] == ["PKD"] * (method == "pcka_mimic")
            assert cfg.SOLVER.MAX_ITER == 180_000
            if method != "student":
                teacher, student = cfg.DISTILL.TEACHER.CONFIG_FILE, cfg.DISTILL.STUDENT
                assert pair.partition("_")[0] in teacher and student.lower() in (
                    pair.partition("_")[0], "generalizedrcnn"
                )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "pair", "method", "figures"),
    [
        ("table1", "resnet110_resnet20", "rcka", {"top-1": 72.26}),
        ("table1", "vgg13_MobileNetV2", "at", {"top-1": 59.4}),
        ("table1", "resnet110_resnet20", "ikl", {}),
        ("table1", "resnet32x4_resnet8x4", "DPK", {}),
        ("table2", "resnet50_mobilenetv1", "dist", {"top-1": 73.24}),
        ("table2", "resnet50_mobilenetv1", "rkd", {}),
        ("table3", "fcos_r101_r50", "FGD", {"AP": 42.1, "APs": 27, "APm": 46, "APl": 54.6}),
    ],
)
def test_the_published_figures_are_those_of_the_paper(name, pair, method, figures):
    assert load_table(name).published(pair, method) == figures


def test_what_was_not_trained_is_missing(call):
    listed = call()
    assert states(listed)["small kd"] == "missing missing"
    assert states(listed)["resnet8 teacher"] == "missing"  # one for both pairs
    assert "0 of 13 runs are done" in listed


def test_a_killed_launch_goes_on_and_what_is_done_stays(call, tmp_path, monkeypatch):
    save_state, calls = RunFolder.save_state, []

    def stop(self, state):
        calls.append(self)
        if len(calls) == 2 + 3:  # two epochs of the teacher, one of two students, and a bit
            raise KeyboardInterrupt
        save_state(self, state)

    selected = ("--pairs", "small", "--methods", "ce", "kd", "--seeds", "1")
    monkeypatch.setattr(RunFolder, "save_state", stop)
    with pytest.raises(KeyboardInterrupt):
        call("--launch", "local", *selected)
    monkeypatch.setattr(RunFolder, "save_state", save_state)
    assert states(call(*selected)) == {
        "resnet8 teacher": "done",
        "small ce": "epoch 2 of 2",  # its metrics are there, its state is not
        "small kd": "epoch 1 of 2",
    }
    folder = tmp_path / "out" / "digits"
    before = times(folder / "teachers")
    assert states(call("--launch", "local", *selected))["small kd"] == "done"
    assert times(folder / "teachers") == before
    before = times(folder / "small")
    call("--launch", "local", *selected)
    assert times(folder / "small") == before
    result = json.loads((folder / "small/kd/seed1/result.json").read_text())
    assert result["epochs"] == 2
    config = load_config(folder / "small/kd/seed1/config.yaml")
    assert str(folder / "teachers/resnet8/model_last.pth") == config.TEACHER.WEIGHTS


def test_the_table_has_the_papers_figures_beside_those_of_the_runs(call, tmp_path):
    call("--launch", "local", "--pairs", "small", "--methods", "ce", "kd")
    text = call("--collect")
    folder = tmp_path / "out" / "digits"
    assert (folder / "digits.md").read_text() == text.removesuffix("\n")
    found = {
        (method, seed): json.loads((folder / f"small/{method}/seed{seed}/result.json").read_text())
        for method in ("ce", "kd")
        for seed in (0, 1)
    }
    best = [found["kd", seed]["best_accuracy"] for seed in (0, 1)]
    mean = sum(best) / 2
    small, large = text.split("## small")[1].split("## large")
    rows = {row[0]: row for row in cells(small) if len(row) > 3}
    head, kd = rows["method"], rows["kd"]
    row = dict(zip(head, kd))
    assert row["seeds"] == "2" and row["missing"] == ""
    assert row["best epoch (%)"].startswith(f"{mean:.2f} ± ")
    assert row["published top-1"] == "52.50"
    assert row["best epoch (%) minus published"] == f"{mean - 52.5:+.2f}"
    assert dict(zip(head, rows["crd"]))["missing"] == "seed 0, 1"
    assert dict(zip(head, rows["crd"]))["last epoch (%)"] == ""
    assert dict(zip(head, rows["DPK"]))["missing"] == "not built in"
    assert "kd" in large and "52.50" not in large
    assert "4 of 12 runs are finished" in text
    lines = list(csv.DictReader((folder / "digits.csv").open()))
    assert len(lines) == 12
    for line in lines:
        result = found.get((line["method"], int(line["seed"])))
        if line["pair"] != "small" or result is None:
            assert (line["state"], line["last_accuracy"]) == ("missing", "")
            continue
        assert float(line["last_accuracy"]) == result["last_accuracy"]
        assert float(line["best_accuracy"]) == result["best_accuracy"]
        assert line["state"] == "done"


def test_runs_of_other_settings_are_told_and_refused_before_the_others(call, tmp_path):
    selected = ("--pairs", "small", "--seeds", "0", "--methods")
    call("--launch", "local", *selected, "ce")
    other = ("--", "SOLVER.BASE_LR", "0.1")
    assert states(call(*selected, "ce", *other))["small ce"] == "other SOLVER.BASE_LR"
    assert "0 of 1 runs are finished" in call("--collect", *selected, "ce", *other)
    assert "Keys of all runs: SOLVER.BASE_LR 0.1." in call("--collect", *selected, "ce", *other)
    with pytest.raises(ConfigError, match=r"resnet8: holds a run with other SOLVER.BASE_LR"):
        call("--launch", "local", *selected, "kd", "ce", *other)
    assert not (tmp_path / "out" / "digits" / "small" / "kd").exists()


def test_pairs_may_not_set_the_seed_or_the_folder(call):
    with pytest.raises(ConfigError, match="SEED: each run has its own; use --seeds instead"):
        call("--launch", "local", "--", "SEED", "1")


def test_a_run_that_fails_is_named_and_the_others_are_trained(call, tmp_path):
    wild = tmp_path / "tables" / "methods"
    wild.mkdir()
    (wild / "kd.yaml").write_text("DISTILL: {METHODS: [KD], KD: {WEIGHT: 1e39}}")
    with pytest.raises(TrainingFailedError, match="small/kd/seed0: epoch 1 is not finite"):
        call("--launch", "local", "--pairs", "small", "--seeds", "0", "--methods", "ce", "kd")
    assert states(call())["small ce"] == "done missing"


def test_losses_that_no_graph_takes_are_trained_apart(plan):
    def groups(together: int) -> list[list[str]]:
        task = Classifiers(plan(methods=["ce", "crd", "kd"], seeds=(0,), together=together))
        return [[run.method for run in group] for group in task._groups(task.jobs()[1])]

    assert groups(8) == [["ce", "kd"], ["crd"]]
    assert groups(1) == [["ce"], ["kd"], ["crd"]]


def test_a_teacher_of_ones_own_is_not_trained(call, plan, tmp_path):
    task = Classifiers(plan(teachers=tmp_path / "theirs"))
    assert not [run for run in task.runs() if run.is_teacher]
    weights = str(tmp_path / "theirs" / "resnet8_vanilla" / "ckpt.pth")
    assert weights == task.configure(task.runs()[0]).TEACHER.WEIGHTS
    with pytest.raises(ConfigError, match=f"TEACHER.WEIGHTS: there is no file '{weights}'"):
        call("--launch", "local", "--teachers", str(tmp_path / "theirs"))
    assert not (tmp_path / "out").exists()


def test_a_job_is_a_pair_and_seed_and_waits_for_its_teacher(plan):
    teacher, *students = Classifiers(plan()).jobs()
    assert (teacher.name, teacher.after, teacher.trains_teacher) == ("teacher-resnet8", "", True)
    assert [job.name for job in students] == [
        f"{pair}-seed{seed}" for pair in ("small", "large") for seed in (0, 1)
    ]
    assert {job.after for job in students} == {teacher.name}
    assert [run.method for run in students[0].runs] == ["ce", "kd", "crd"]


def test_the_command_of_a_job_trains_that_job(plan, table):
    made = plan(overrides=("SOLVER.EPOCHS", "3"), gpus=2, teachers=None)
    teacher, student, *_ = Classifiers(made).jobs()
    own = [str(table), "--launch", "local", "--pairs", "small"]
    own += ["--output", str(made.output.parent), "--gpus", "2", "--together", "8"]
    assert made.command(teacher, "local")[2:] == [
        *own, "--teachers-only", "--", "SOLVER.EPOCHS", "3"
    ]  # fmt: skip
    assert made.command(student, "local")[2:] == [
        *own, "--methods", "ce", "kd", "crd", "--seeds", "0", "--", "SOLVER.EPOCHS", "3"
    ]  # fmt: skip


def test_torchrun_starts_the_processes_of_each_job(call, monkeypatch):
    started = []

    def run(command, check):
        started.append(command)
        return SimpleNamespace(returncode=int("--teachers-only" not in command))

    monkeypatch.setattr(classifiers.subprocess, "run", run)
    with pytest.raises(TrainingFailedError, match="small-seed1: its processes failed"):
        call("--launch", "torchrun", "--gpus", "2", "--pairs", "small")
    assert [command[: len(TORCHRUN) + 1] for command in started] == [[*TORCHRUN, "2"]] * 3
    assert [command[-1] for command in started] == ["--teachers-only", "0", "1"]


def test_students_whose_teacher_failed_are_not_trained(call, monkeypatch):
    started = []
    monkeypatch.setattr(
        classifiers.subprocess, "run", lambda command, check: (
            started.append(command) or SimpleNamespace(returncode=1)
        )
    )  # fmt: skip
    with pytest.raises(TrainingFailedError, match="small-seed0: needs teacher-resnet8"):
        call("--launch", "torchrun", "--pairs", "small")
    assert len(started) == 1


@pytest.mark.slow
def test_two_processes_train_a_job(call, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    selected = ("--pairs", "small", "--methods", "ce", "kd", "--seeds", "0")
    listed = call("--launch", "torchrun", "--gpus", "2", *selected)
    assert states(listed) == dict.fromkeys(("resnet8 teacher", "small ce", "small kd"), "done")


def test_hours_follow_from_a_step():
    step = Step(seconds=0.5, steps=7200, gpus=8, size=3)
    assert step.gpu_hours == 8.0


def test_the_estimate_counts_what_is_missing_and_measures_alike_jobs_once(plan, monkeypatch):
    task, measured = Classifiers(plan()), []

    def steps(job):
        measured.append(job.name)
        return [Step(3.6, 1000, 1, 2**30)] * (1 if job.trains_teacher else 2)

    done = State("done", {"epochs": 2})
    state = task.state
    monkeypatch.setattr(task, "steps", steps)
    monkeypatch.setattr(
        task, "state", lambda run: done if (run.pair, run.seed) == ("large", 1) else state(run)
    )
    rows = {row[0]: row[1:] for row in cells(estimate.table(task.plan, task)) if len(row) > 3}
    assert measured == ["teacher-resnet8", "small-seed0", "large-seed0"]
    assert rows["teacher-resnet8"] == ["1", "1.00", "1.00"]
    assert rows["small"] == ["6", "4.00", "4.00"]
    assert rows["large"] == ["3", "2.00", "2.00"]
    assert rows["all"] == ["10", "7.00", "7.00"]


def test_steps_and_sizes_are_those_of_the_training(call, plan, tmp_path):
    selected = {"pairs": ["small"], "methods": ["kd"], "seeds": (0,)}
    task = Classifiers(plan(**selected))
    call("--launch", "local", "--pairs", "small", "--methods", "kd", "--seeds", "0")
    (cfg,) = [task.configure(run) for run in task.runs() if not run.is_teacher]
    step = classifiers_step([cfg], 400, 10, gpus=1)
    assert step.steps == 40 // 10 * 2
    assert step.seconds > 0
    files = ("checkpoint.pth", "model_last.pth", "model_best.pth")
    written = sum((Path(cfg.OUTPUT_DIR) / name).stat().st_size for name in files)
    assert step.size == pytest.approx(written, rel=0.03)
    shared = classifiers_step([cfg, cfg], 400, 10, gpus=2)
    assert (shared.steps, shared.gpus) == (8, 2)  # not fewer steps: a part of each batch
    assert shared.size == pytest.approx(2 * step.size, rel=0.03)


def test_the_estimate_says_what_it_is(call):
    text = call("--estimate", "--pairs", "small", "--methods", "ce", "crd", "--seeds", "0")
    assert [row[0] for row in cells(text) if len(row) > 3][2:] == [
        "teacher-resnet8", "small", "all"
    ]  # fmt: skip
    assert "Estimate: a few steps on 1 CPU threads" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pairs", "smal"), "--pairs: the table has no 'smal'; near matches: small"),
        (("--methods", "dk"), "--methods: the table has no 'dk'"),
        (("--seeds", "1", "1"), "--seeds: expected each one once"),
        (("--", "SOLVER.EPOCH", "1"), "unknown key 'SOLVER.EPOCH'"),
    ],
)
def test_a_wrong_name_is_refused(call, words, message):
    with pytest.raises(ConfigError, match=message):
        call(*words)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("METHODS: {ce: [50.0]}", r"digits.yaml: ce: expected a figure .* each of 2 pairs"),
        ("TASK: segmentation", "TASK: expected classification or detection, got 'segmentation'"),
        ("SEED: [0]", "unknown key 'SEED'; near matches: SEEDS"),
        ("GPUS: many", "GPUS: expected a value of type int, got 'many'"),
        ("GPUS: 0", "GPUS: expected at least 1, got 0"),
        ("TITLE: [", "is not YAML"),
        ("1: 2", "unknown key '1'"),
        ("METHODS: {}", "METHODS: expected one entry or more, got none"),
        ("SEEDS: []", "SEEDS: expected one entry or more, got none"),
        ("SEEDS: [x]", "SEEDS: expected whole numbers, got 'x'"),
        ("COLUMNS: []", "COLUMNS: expected one entry or more, got none"),
        ("PAIRS: {small: [1], large: a.yaml}", r"PAIRS: small: expected a file.* has \[1\]"),
        ("PAIRS: {small: {kd: f.yaml}, large: a.yaml}", "PAIRS: small: .*; ce has None"),
        ("METHODS: {ce: [x, 1.0]}", "ce: expected figures or null, got 'x'"),
    ],
)
def test_a_file_that_is_no_table_is_refused(call, table, line, message):
    key = line.partition(":")[0]
    kept = [text for text in TABLE.splitlines() if not text.startswith(f"{key}:")]
    table.write_text("\n".join([*kept, line]))
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_table_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(ConfigError, match=r"TABLE: no table 'tabel1'; near matches: table1"):
        reproduce.main(["tabel1"])
    assert {path.stem for path in TABLES.glob("*.yaml")} == {"table1", "table2", "table3"}


def test_ctrl_c_in_the_processes_of_a_job_ends_the_launch(call, monkeypatch):
    monkeypatch.setattr(
        classifiers.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=130)
    )
    with pytest.raises(KeyboardInterrupt):
        call("--launch", "torchrun")


def test_a_result_that_is_damaged_is_not_counted(call, tmp_path):
    selected = ("--pairs", "small", "--methods", "ce", "--seeds", "0")
    call("--launch", "local", *selected)
    (tmp_path / "out/digits/small/ce/seed0/result.json").write_text("{")
    assert states(call(*selected))["small ce"] == "epoch 2 of 2"
    assert states(call("--launch", "local", *selected))["small ce"] == "done"


def test_a_figure_that_is_not_a_number_is_left_out():
    assert [collect._cell(value) for value in (None, float("nan"), 1.5)] == ["", "", 1.5]


@pytest.mark.slow
def test_the_script_tells_a_mistake_in_one_line():
    script = [*TORCHRUN[:1], str(Path(reproduce.__file__)), "table1", "--pairs", "none"]
    ended = subprocess.run(script, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: --pairs: the table has no 'none'; ")
    assert ended.stderr.count("\n") == 1
