"""A whole training, small: its files, its operators, and what happens when it is broken off."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import pcka
from classification.config import load_config
from classification.models import create_model
from classification.run import run_experiment
from classification.train import main
from pcka.engine.command import TrainingFailedError
from pcka.engine.config import ConfigError

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "classification" / "digits" / "resnet20_resnet8.yaml"
SMALL = [
    "DATA.TRAIN_IMAGES", "100", "DATA.HOLDOUT", "100", "DATA.IMAGE_SIZE", "16",
    "SOLVER.EPOCHS", "2", "SOLVER.BATCH_SIZE", "20", "TEACHER.NAME", "resnet8",
    "TEACHER.EPOCHS", "1", "REPORT", "False",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("teachers"))


def small_config(method, output, cache, *words):
    own = ["OUTPUT_DIR", str(output), "TEACHER.CACHE_DIR", cache]
    return load_config(DIGITS, [*SMALL, *own, *words], method)


def tensors(path):
    return torch.load(path, weights_only=True)


def metrics(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "images_per_second", "data_share")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def test_a_run_leaves_what_a_person_expects(tmp_path, cache):
    words = [*SMALL, "OUTPUT_DIR", str(tmp_path), "TEACHER.CACHE_DIR", cache]
    result = main(["--config-file", str(DIGITS), "--method", "kd_fcka", *words])
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "config.yaml", "classes.txt", "environment.json", "log.txt", "metrics.jsonl", "tensorboard",
        "checkpoint.pth", "model_last.pth", "model_best.pth", "result.json", "curves.png",
    }  # fmt: skip
    assert not any(name.endswith(".tmp") for name in names)
    first, last = metrics(tmp_path)
    assert (first["epoch"], last["epoch"]) == (1, 2)
    terms = {"loss_ce", "loss_kd", "loss_fcka_stage1", "loss_fcka_stage2", "loss_fcka_stage3"}
    assert terms < first.keys() and {f"cka_stage{i}" for i in range(4)} < first.keys()
    assert first["loss_total"] == pytest.approx(sum(first[term] for term in terms), rel=1e-5)
    assert result["last_accuracy"] == last["accuracy"]
    assert result["best_accuracy"] == max(m["accuracy"] for m in (first, last))
    assert (tmp_path / "classes.txt").read_text().split() == list("0123456789")
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert torch.__version__.startswith(environment["torch"]) and environment["seed"] == 0
    assert environment["build_info"] == pcka.build_info()
    student = tensors(tmp_path / "model_last.pth")
    assert not any("teacher" in name for name in student)
    with pytest.raises(ConfigError, match=r"holds a run .*--resume"):
        main(["--config-file", str(DIGITS), "--method", "kd_fcka", *words])


@pytest.mark.skipif(not pcka.build_info()["extension"], reason="the operators are not loaded")
def test_the_rcka_step_runs_on_the_compiled_operators(tmp_path, cache):
    cfg = small_config("rcka", tmp_path, cache, "SOLVER.EPOCHS", "1")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run_experiment(cfg)
    calls = {event.key: event.count for event in profiler.key_averages()}
    assert calls["pcka::cka"] == 3 * (
        5 + 1
    )  # FCKA, intra and inter in each of five steps and the trial


def test_the_teacher_is_trained_once_and_kept(tmp_path, cache):
    run_experiment(small_config("kd", tmp_path / "a", cache))
    files = {path: path.stat().st_mtime_ns for path in Path(cache).glob("*.pth")}
    run_experiment(small_config("kd", tmp_path / "b", cache, "SEED", "1"))
    assert {path: path.stat().st_mtime_ns for path in Path(cache).glob("*.pth")} == files
    run_experiment(small_config("kd", tmp_path / "c", cache, "TEACHER.SEED", "1"))
    assert len(list(Path(cache).glob("*.pth"))) == len(files) + 1


MODERN = [
    "SOLVER.OPTIMIZER", "adamw", "SOLVER.BASE_LR", "0.002", "SOLVER.SCHEDULE", "onecycle",
    "SOLVER.WARMUP_EPOCHS", "0", "SOLVER.CLIP_GRADIENTS", "1", "SOLVER.ACCUMULATE", "2",
    "SOLVER.EMA_DECAY", "0.9", "SOLVER.DECAY_NORMS_AND_BIASES", "false",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], MODERN], ids=["sgd", "adamw"])
def test_a_killed_run_continues_bit_for_bit(tmp_path, cache, assert_same_run, more):
    """SIGKILL in the middle of an epoch, then --resume: as if nothing had happened."""

    def command(folder):
        return [
            sys.executable, "classification/train.py", "--config-file", str(DIGITS),
            "--method", "kd_fcka", *SMALL, "OUTPUT_DIR", str(folder),
            "TEACHER.CACHE_DIR", cache, "SOLVER.EPOCHS", "4", *more, "--resume",
        ]  # fmt: skip

    # Both in processes of their own: the figures depend on the number of threads.
    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    folder = tmp_path / "killed"
    process = subprocess.Popen(command(folder), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    epochs = tensors(folder / "checkpoint.pth")["epoch"]
    assert 1 <= epochs < 4
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "accuracy": 1')  # torn by the kill
    subprocess.run(command(folder), cwd=ROOT, check=True, capture_output=True)
    assert_same_run(folder, tmp_path / "whole")


def test_resume_refuses_another_configuration(tmp_path, cache):
    run_experiment(small_config("ce", tmp_path, cache))
    finished = (tmp_path / "result.json").read_bytes()
    run_experiment(small_config("ce", tmp_path, cache), resume=True)
    assert (tmp_path / "result.json").read_bytes() == finished
    with pytest.raises(ConfigError, match=r"other values of SOLVER\.BASE_LR"):
        run_experiment(small_config("ce", tmp_path, cache, "SOLVER.BASE_LR", "1"), resume=True)


def test_a_loss_that_is_not_finite_stops_and_spares_the_checkpoint(tmp_path, cache):
    run_experiment(small_config("ce", tmp_path, cache, "SOLVER.SCHEDULE", "multistep"))
    good = (tmp_path / "checkpoint.pth").read_bytes()
    state = tensors(tmp_path / "checkpoint.pth")
    state["student"]["conv1.weight"][0] = torch.nan
    torch.save(state, tmp_path / "checkpoint.pth")
    poisoned = (tmp_path / "checkpoint.pth").read_bytes()
    assert poisoned != good
    longer = ["SOLVER.SCHEDULE", "multistep", "SOLVER.EPOCHS", "3"]
    expected = r"epoch 3 is not finite at step 1: loss_ce=nan.*checkpoint\.pth \(epoch 2\)"
    with pytest.raises(TrainingFailedError, match=expected):
        run_experiment(small_config("ce", tmp_path, cache, *longer), resume=True)
    assert (tmp_path / "checkpoint.pth").read_bytes() == poisoned
    assert len(metrics(tmp_path)) == 2


def test_what_cannot_be_trained_is_refused_before_training(tmp_path, cache):
    with pytest.raises(ConfigError, match=r"TEACHER\.WEIGHTS: the teacher 'resnet8' has no"):
        run_experiment(small_config("kd", tmp_path, cache, "TEACHER.TRAIN", "false"))
    with pytest.raises(ValueError, match=r"KD needs a teacher, but TEACHER\.NAME is empty"):
        run_experiment(small_config("kd", tmp_path, cache, "TEACHER.NAME", ""))
    with pytest.raises(ValueError, match="7 classes are configured, the data has 10"):
        run_experiment(small_config("ce", tmp_path / "a", cache, "DATA.NUM_CLASSES", "7"))
    torch.save(create_model("resnet8", 100).state_dict(), tmp_path / "hundred.pth")
    words = ["TEACHER.WEIGHTS", str(tmp_path / "hundred.pth")]
    with pytest.raises(ValueError, match="classifier of 100 classes, but the data has 10"):
        run_experiment(small_config("kd", tmp_path / "b", cache, *words))


@pytest.mark.parametrize(
    ("option", "exact"), [(["CHANNELS_LAST", "true"], True), (["AUTOCAST", "bfloat16"], False)]
)
@pytest.mark.parametrize(("method", "count"), [("rcka", 5), ("ce", 2)])
def test_the_faster_options_compute_the_same_up_to_their_rounding(
    tmp_path, cache, option, exact, method, count
):
    """With a teacher, and without one, whose rounding would stand in for the student's."""
    plainly = ["CHANNELS_LAST", "false", "AUTOCAST", ""]
    runs = {"plain": plainly, "fast": [*plainly, *option]}
    for name, words in runs.items():
        words = [*words, "SOLVER.EPOCHS", "1", "SOLVER.BASE_LR", "0.001"]
        run_experiment(small_config(method, tmp_path / name, cache, *words))
    (plain,), (fast,) = (metrics(tmp_path / name) for name in runs)
    terms = [key for key in plain if key.startswith("loss_")]
    assert len(terms) == count
    for term in terms:
        assert fast[term] == pytest.approx(plain[term], rel=1e-5 if exact else 0.05)
    assert exact or any(fast[term] != plain[term] for term in terms)
