"""A table of detectors: its runs, each a job, and what is said of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("detectron2")

from detection.config import PROJECT, load_config
from pcka.engine.command import TrainingFailedError
from pcka.engine.config import ConfigError
from tools import reproduce
from tools.paper.detectors import Detectors
from tools.paper.table import TORCHRUN, Plan, load_table

TABLE = """
TITLE: Scenes of digits
TASK: detection
COLUMNS: [AP, AP50]
SEEDS: [0]
GPUS: 2
CONFIGS: {configs}
PAIRS: {{pair: {{student: student.yaml, pcka: pcka.yaml}}}}
METHODS: {{student: [[20.0, 40.0]], pcka: [[25.0, null]]}}
NOT_HERE: {{GID: [[30.0, 50.0]]}}
"""
SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.FPN.OUT_CHANNELS", "32",
    "MODEL.RETINANET.NORM", "",
    "INPUT.MIN_SIZE_TRAIN", "[96]", "SOLVER.MAX_ITER", "10", "SOLVER.CHECKPOINT_PERIOD", "4",
]  # fmt: skip


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "scenes.yaml"
    path.write_text(TABLE.format(configs=PROJECT / "configs" / "detection" / "digits"))
    return path


@pytest.fixture
def call(table, tmp_path, capsys):
    """``call(*words, keys=())``: what the command prints."""
    weights = tmp_path / "teacher.pth"
    weights.touch()

    def run(*words: str, keys: tuple[str, ...] = ()) -> str:
        capsys.readouterr()
        keys = ("DISTILL.TEACHER.WEIGHTS", str(weights), *SMALL, *keys)
        reproduce.main([str(table), "--output", str(tmp_path / "out"), *words, "--", *keys])
        return capsys.readouterr().out

    return run


@pytest.fixture
def trainings(monkeypatch):
    """The commands of the trainings, which leave what a run does; PCKA is killed at first."""
    commands = []

    def run(command, **_):
        commands.append(command)
        config, *keys = command[command.index("--config-file") + 1 :]
        cfg = load_config(config, keys)
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(cfg.dump())
        (folder / "last_checkpoint").write_text("model_0000003.pth")
        killed = cfg.DISTILL.STUDENT and len(commands) < 3
        if not killed:
            metrics = {"AP": 21.5, "AP50": 41.0, "AP75": None}
            (folder / "result.json").write_text(json.dumps({"bbox": metrics}))
        return SimpleNamespace(returncode=int(bool(killed)))

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def states(text: str) -> list[str]:
    return [" ".join(line.split()[1:]) for line in text.splitlines() if line.startswith("pair ")][
        1:
    ]


def test_every_run_is_trained_by_its_processes_and_goes_on(call, trainings, tmp_path):
    assert states(call()) == ["student missing", "pcka missing"]
    with pytest.raises(TrainingFailedError, match=r"pair/pcka/seed0' failed"):
        call("--launch", "torchrun")
    assert [command[: len(TORCHRUN) + 1] for command in trainings] == [[*TORCHRUN, "2"]] * 2
    assert states(call()) == ["student done", "pcka step 4 of 10"]
    tag = tmp_path / "out/scenes/pair/pcka/seed0/last_checkpoint"
    tag.write_text("model_final.pth")  # it was stopped before its evaluation
    assert states(call()) == ["student done", "pcka step 10 of 10"]
    assert states(call("--launch", "local")) == ["student done", "pcka done"]
    assert len(trainings) == 3
    assert trainings[-1][0] != TORCHRUN[1] and "--resume" in trainings[-1]
    assert str(tmp_path / "out/scenes/pair/pcka/seed0") in trainings[-1]


def test_the_figures_of_each_metric_stand_beside_the_papers(call, trainings, tmp_path):
    with pytest.raises(TrainingFailedError):
        call("--launch", "local")
    text = call("--collect")
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    rows = {line[1]: line for line in lines if len(line) > 3}
    student, pcka, other = (dict(zip(rows["method"], rows[name])) for name in
                            ("student", "pcka", "GID"))  # fmt: skip
    assert (student["AP"], student["published AP"], student["published AP50"]) == (
        "21.50", "20.00", "40.00",
    )  # fmt: skip
    assert student["AP minus published"] == "+1.50"
    assert (pcka["AP"], pcka["published AP"], pcka["published AP50"]) == ("", "25.00", "")
    assert (pcka["missing"], other["missing"]) == ("seed 0", "not built in")
    written = (tmp_path / "out" / "scenes" / "scenes.csv").read_text().splitlines()
    assert written[1:] == [
        "pair,student,0,done,21.5,41.0,20.0,40.0",
        "pair,pcka,0,step 4 of 10,,,25.0,",
    ]


def test_a_run_of_other_settings_is_told_and_refused(call, trainings):
    with pytest.raises(TrainingFailedError):
        call("--launch", "local")
    other = ("SOLVER.BASE_LR", "0.5")
    assert states(call(keys=other)) == [
        "student other SOLVER.BASE_LR", "pcka other SOLVER.BASE_LR"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"student/seed0: holds a run with other SOLVER.BASE_LR"):
        call("--launch", "local", keys=other)
    assert len(trainings) == 2


def test_a_teacher_that_is_not_there_is_told_before_anything_is_trained(call, trainings):
    missing = ("DISTILL.TEACHER.WEIGHTS", "weights/none.pth")
    with pytest.raises(ConfigError, match=r"no file 'weights/none.pth'"):
        call("--launch", "local", keys=missing)
    with pytest.raises(ConfigError, match="--teachers: is for classifiers"):
        call("--teachers", "weights")
    assert not trainings


def test_a_job_is_one_run(table, tmp_path):
    shipped = load_table(str(table))
    plan = Plan(shipped, tmp_path, shipped.pairs, shipped.methods, (0, 1), 1, 8)
    jobs = Detectors(plan).jobs()
    assert [job.name for job in jobs] == [
        f"pair-{method}-seed{seed}" for method in ("student", "pcka") for seed in (0, 1)
    ]
    assert plan.command(jobs[-1], "torchrun")[-4:] == ["--methods", "pcka", "--seeds", "1"]


def test_the_estimate_is_of_real_steps(table, tmp_path):
    shipped = load_table(str(table))
    keys = (*SMALL, "DISTILL.PCKA.PATCH_SIZES", "[4, 4, 2]", "DISTILL.TEACHER.OPTS",
            str(["MODEL.FPN.OUT_CHANNELS", 32]))  # fmt: skip

    def steps(*more: str) -> list:
        given = (*keys, *more)
        plan = Plan(shipped, tmp_path, shipped.pairs, shipped.methods, (0,), 2, 8, None, given)
        task = Detectors(plan)
        return [task.steps(job)[0] for job in task.jobs()]

    student, distilled = steps()
    assert student.seconds > 0 and (student.steps, student.gpus) == (10, 2)
    assert distilled.size >= student.size
    seldom, _ = steps("SOLVER.CHECKPOINT_PERIOD", "8")
    # After steps 4 and 8, or 8 alone, and at the end: each with weights and momentum.
    assert student.size / 3 == seldom.size / 2 > 8 * 100_000


@pytest.mark.slow
def test_a_real_training_leaves_what_was_estimated(call, table, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    scenes = ("DATASETS.DIGITS.ROOT", str(tmp_path / "scenes"), "DATASETS.DIGITS.SIDE", "128",
              "DATASETS.DIGITS.TRAIN_IMAGES", "8", "DATASETS.DIGITS.TEST_IMAGES", "4",
              "INPUT.MIN_SIZE_TEST", "128", "SOLVER.STEPS", "[8]")  # fmt: skip
    call("--launch", "local", "--methods", "student", keys=scenes)
    text = call("--collect", keys=scenes)
    folder = tmp_path / "out" / "scenes" / "pair" / "student" / "seed0"
    found = json.loads((folder / "result.json").read_text())["bbox"]
    line = (tmp_path / "out" / "scenes" / "scenes.csv").read_text().splitlines()[1]
    assert line == f"pair,student,0,done,{found['AP']},{found['AP50']},20.0,40.0"
    assert f"{found['AP']:.2f}" in text
    shipped = load_table(str(table))
    keys = (*SMALL, *scenes)
    task = Detectors(Plan(shipped, tmp_path, shipped.pairs, ["student"], (0,), 1, 8, None, keys))
    written = [path.stat().st_size for path in folder.glob("*.pth")]
    assert len(written) == 3
    assert task.steps(task.jobs()[0])[0].size == pytest.approx(sum(written), rel=0.03)
