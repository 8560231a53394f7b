"""Jobs for SLURM: what is submitted, and that it trains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pcka.engine.config import ConfigError
from tools.paper import slurm
from tools.paper.classifiers import Classifiers
from tools.paper.table import Job, Plan, Run, load_table

RECIPE = """
DEVICE: cpu
DATA: {NAME: digits, IMAGE_SIZE: 16, HOLDOUT: 40, TRAIN_IMAGES: 40, CROP_PADDING: 0, FLIP: false}
TEACHER: {NAME: resnet8}
STUDENT: {NAME: resnet8}
SOLVER: {EPOCHS: 1, BATCH_SIZE: 10, MILESTONES: []}
"""
TABLE = """
TITLE: Digits
TASK: classification
COLUMNS: [top-1]
SEEDS: [0]
GPUS: 1
CONFIGS: .
PAIRS: {pair: pair.yaml}
TEACHERS: {TRAINED_BY: pair.yaml}
METHODS: {ce: [null], kd: [null]}
"""
SBATCH = """#!/bin/sh
cp "$1" "{folder}/$(ls "{folder}" | wc -l).sh"
echo "Submitted batch job $((99 + $(ls "{folder}" | wc -l)))"
"""


@pytest.fixture
def plan(tmp_path) -> Plan:
    (tmp_path / "pair.yaml").write_text(RECIPE)
    (tmp_path / "digits.yaml").write_text(TABLE)
    table = load_table(str(tmp_path / "digits.yaml"))
    return Plan(table, tmp_path / "out" / "digits", ["pair"], ["ce", "kd"], (0,), 2, 8)


@pytest.fixture
def queue(tmp_path, monkeypatch) -> Path:
    """A folder that gets what is submitted to a SLURM that runs nothing."""
    pytest.importorskip("submitit")
    folder, commands = tmp_path / "queue", tmp_path / "bin"
    folder.mkdir()
    commands.mkdir()
    (commands / "srun").write_text("#!/bin/sh\n")
    (commands / "sbatch").write_text(SBATCH.format(folder=folder))
    for path in commands.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    return folder


def command_of(job) -> tuple[str, ...]:
    return job.submission().function.words


def test_the_students_wait_for_their_teacher(plan, queue):
    given = {"partition": "gpu", "timeout_min": 90, "cpus_per_task": 8}
    jobs = Classifiers(plan).jobs()
    submitted = slurm.submit(plan, jobs, given)
    assert list(submitted) == ["teacher-resnet8", "pair-seed0"]
    teacher, students = (set((queue / f"{n}.sh").read_text().splitlines()) for n in (0, 1))
    shared = {"partition=gpu", "time=90", "cpus-per-task=8", "gpus-per-node=2", "nodes=1",
              "ntasks-per-node=1"}  # fmt: skip
    assert teacher & students >= {f"#SBATCH --{flag}" for flag in shared}
    assert "#SBATCH --job-name=digits-pair-seed0" in students
    assert "#SBATCH --dependency=afterok:100" in students
    assert "#SBATCH --kill-on-invalid-dep=yes" in students
    assert not any("dependency" in line for line in teacher)


def test_a_job_of_several_gpus_starts_its_processes_by_torchrun(plan, queue):
    jobs = Classifiers(plan).jobs()
    for name, job in slurm.submit(plan, jobs, {}).items():
        words = command_of(job)
        assert words == tuple(plan.command(next(j for j in jobs if j.name == name), "torchrun"))
        assert words[words.index("--launch") + 1] == "torchrun"
        assert words[words.index("--gpus") + 1] == "2"


@pytest.mark.parametrize(("given", "message"), [({"parttion": "gpu"}, "parttion"), ({}, "srun")])
def test_what_slurm_does_not_take_is_told(plan, queue, monkeypatch, given, message):
    if not given:
        monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=f"--slurm: .*{message}"):
        slurm.submit(plan, Classifiers(plan).jobs(), given)


def test_options_have_the_values_of_yaml():
    assert slurm.options(["partition=gpu", "timeout_min=90", "exclude=a=b"]) == {
        "partition": "gpu", "timeout_min": 90, "exclude": "a=b",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"^--slurm: a value is not YAML"):
        slurm.options(["exclude=[1"])
    with pytest.raises(ConfigError, match=r"--slurm: expected KEY=VALUE, .* got 'gpu'"):
        slurm.options(["gpu"])


def test_without_submitit_the_way_to_get_it_is_told(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r"pip install 'pcka\[slurm\]'"):
        slurm.submit(plan, Classifiers(plan).jobs(), {})


def test_a_job_ends_badly_where_its_command_does(tmp_path):
    slurm.Command((sys.executable, "-c", f"open({str(tmp_path / 'file')!r}, 'w')"))()
    assert (tmp_path / "file").exists()
    with pytest.raises(Exception, match="returned non-zero exit status 3"):
        slurm.Command((sys.executable, "-c", "raise SystemExit(3)"))()


@pytest.mark.slow
def test_a_job_that_is_submitted_trains_its_runs(plan, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    task = Classifiers(Plan(**{**vars(plan), "gpus": 1}))
    for job in task.jobs():  # one after the other: without SLURM nothing waits
        (submitted,) = slurm.submit(task.plan, [job], {}, cluster="local").values()
        submitted.result()
    assert all(task.state(run).done for run in task.runs())


# Counts its starts. In the first one all processes are told, as by SLURM, that the time is up.
WAITING = """
import os, signal, sys, time
from pathlib import Path
starts = Path(sys.argv[1])
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if starts.read_text() == "x":
    for process in (os.getpid(), os.getppid()):
        os.kill(process, signal.SIGUSR2)
    time.sleep(120)
"""


@pytest.mark.slow
def test_a_job_whose_time_is_up_starts_again(plan, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    starts = tmp_path / "starts"
    words = [sys.executable, "-c", WAITING, str(starts)]
    monkeypatch.setattr(Plan, "command", lambda *_: words)
    job = Job("job", (Run("pair", "ce", 0, tmp_path, tmp_path, ()),))
    (submitted,) = slurm.submit(plan, [job], {}, cluster="local").values()
    submitted.result()
    assert starts.read_text() == "xx"
