"""Several processes under torchrun: what they learn together, who writes, and how they end."""

from __future__ import annotations

import json
import time

import pytest
import torch

from pcka.engine.run_folder import read_metrics
from pcka.files import load_file

pytestmark = pytest.mark.slow

EPOCHS, TEACHER_EPOCHS = 6, 2
SETTINGS = {
    "STUDENT.NAME": "resnet8_groups",
    "TEACHER.NAME": "resnet8_groups",
    "TEACHER.EPOCHS": TEACHER_EPOCHS,
    "DEVICE": "cpu",
    "CHANNELS_LAST": False,
    "AUTOCAST": "",
    "DATA.IMAGE_SIZE": 16,
    "DATA.HOLDOUT": 101,  # no two processes can share them evenly
    "DATA.TRAIN_IMAGES": 100,
    "SOLVER.EPOCHS": EPOCHS,
    "REPORT": False,
    "SOLVER.BATCH_SIZE": 20,
    "SOLVER.BASE_LR": 0.01,
    "DISTILL.RCKA.FEATURE_WEIGHTS": [0.7],
    "DISTILL.RCKA.INTRA_WEIGHT": 1.0,
    "DISTILL.RCKA.INTER_WEIGHT": 1.0,
}

# Batch norm would take its statistics of the part of a batch that a process has. Without it the
# number of processes changes nothing but the order of sums.
SCRIPT = """
import torch
from torch import nn

from classification.models import create_model
from classification.models.registry import register
from classification.train import main


def with_group_norm(classes):
    model = create_model("resnet8", classes)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(path, nn.GroupNorm(4, module.num_features))
    return model


def with_mask_token(classes):
    model = with_group_norm(classes)
    model.mask_token = nn.Parameter(torch.ones(3))  # of no forward pass
    return model


register("resnet8_groups")(with_group_norm)
register("resnet8_masked")(with_mask_token)
main()
"""

EVALUATION = """
import torch
from torch import nn

from classification.data import ResidentSet
from classification.evaluation import accuracy
from pcka.engine.launch import process_group
from pcka.distributed import rank

torch.manual_seed(2)
images = torch.randint(256, (7, 3, 4, 4), dtype=torch.uint8)
model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 6))
guesses = model(images.float() / 255).argsort(1, descending=True)
labels = guesses[range(7), [0, 1, 5, 0, 4, 1, 0]]  # which guess is right
data = ResidentSet(images, labels, tuple("abcdef"))
with process_group("cpu"):
    figures = [accuracy(model, nn.Identity(), data.subset(torch.arange(n))) for n in (7, 2)]
    if rank() == 0:
        print(*(round(figure[f"top{k}"], 1) for figure in figures for k in (1, 5)))
"""

# A loss that is not finite in the second process alone, in the step before the losses are read.
DISAGREEMENT = """
import sys

from classification.config import load_config
from classification.sweep import run_side_by_side
from pcka.engine.loss_window import LossWindow
from pcka.distributed import rank

STEPS = 5
add = LossWindow.add


def broken(self, names, terms):
    self.steps = getattr(self, "steps", 0) + 1
    if "loss_kd" in names and rank() == 1 and self.steps == STEPS:
        terms = terms.clone()
        terms[names.index("loss_kd")] = float("nan")
    add(self, names, terms)


LossWindow.add = broken
config, output, *words = sys.argv[1:]
cfgs = [
    load_config(config, [*words, "OUTPUT_DIR", f"{output}/{method}"], method)
    for method in ("kd", "at")
]
failed, finished = run_side_by_side(cfgs)
print(f"{failed}; {finished['epochs']}")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("torchrun")


@pytest.fixture(scope="module")
def train(folder, start, digits_config):
    """``train(run, *flags, processes=1, **keys)``: start a training into ``folder / run``."""
    script = folder / "script.py"
    script.write_text(SCRIPT)

    def train(run, *flags, processes=1, **keys):
        places = {"OUTPUT_DIR": folder / run, "TEACHER.CACHE_DIR": folder / f"{run}_teachers"}
        pairs = {**SETTINGS, **places, **keys}.items()
        words = ["--config-file", digits_config, "--method", "kd_rcka", *flags]
        return start(
            script, *words, *(word for pair in pairs for word in pair), processes=processes
        )

    return train


@pytest.fixture(scope="module")
def by_two(train, folder):
    """The folder of a run of two processes that nothing disturbed, and what it printed."""
    return folder / "two", train("two", processes=2, REPORT=True).succeed()


def assert_learned_alike(ours, theirs):
    """Figures of every epoch and the weights after the last one agree.

    As far as rounding lets them, which grows a hundredfold an epoch on some processors.
    """
    records = [read_metrics(run / "metrics.jsonl") for run in (ours, theirs)]
    assert [[record["epoch"] for record in run] for run in records] == [[*range(1, EPOCHS + 1)]] * 2
    for own, other in zip(*records, strict=True):
        assert own.keys() == other.keys()
        near = min(1e-4 * 30 ** (own["epoch"] - 1), 0.2)
        for key in own:
            if key.startswith(("loss", "cka", "lr", "gradient")):
                assert own[key] == pytest.approx(other[key], rel=near, abs=min(near, 5e-4)), key
            elif "accuracy" in key:
                assert own[key] == pytest.approx(other[key], abs=1.0)  # one image
    for name in {path.name for path in ours.glob("model_[el]*.pth")}:  # of ema and last
        weights = [load_file(run / name) for run in (ours, theirs)]
        torch.testing.assert_close(*weights, rtol=0, atol=2e-3)


def epochs_of(run):
    """The epochs that a run has completed so far."""
    return load_file(run / "checkpoint.pth")["epoch"] if (run / "checkpoint.pth").exists() else 0


def test_two_processes_learn_what_one_learns_and_the_first_alone_writes(by_two, train, folder):
    run, printed = by_two
    train("one").succeed()
    assert_learned_alike(run, folder / "one")
    assert printed.count(f"epoch {EPOCHS}/{EPOCHS} ") == printed.count("finished:") - 1 == 1
    assert printed.count("teacher resnet8_groups: accuracy") == 1
    logged = (run / "log.txt").read_text()
    assert all(logged.count(f"epoch {epoch}/{EPOCHS} ") == 1 for epoch in range(1, EPOCHS + 1))
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    assert not list(run.glob(".*"))  # temporary files
    # The first process measures alone, and no other waits in its place.
    report = json.loads((run / "report.json").read_text())
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert report["models"]["student"]["top1"] == pytest.approx(last["accuracy"], abs=1.0)
    assert report["cka"]["student"][3][3] == pytest.approx(last["cka_stage3"], abs=0.01)
    assert printed.count("report: ") == 2  # the teacher's, too


def test_two_processes_accumulate_clip_and_average_what_one_does(train, folder):
    """The gradients of a group's first batches are not exchanged; those of its last one are."""
    keys = {
        "SOLVER.OPTIMIZER": "adamw",
        "SOLVER.BASE_LR": 0.001,
        "SOLVER.EPS": 1e-3,  # of a gradient near 0 AdamW makes a step by its sign
        "SOLVER.ACCUMULATE": 2,
        "SOLVER.CLIP_GRADIENTS": 0.5,
        "SOLVER.EMA_DECAY": 0.7,
    }
    for name, processes in (("modern_two", 2), ("modern_one", 1)):
        train(name, processes=processes, **keys).succeed()
    assert (folder / "modern_two" / "model_ema.pth").exists()
    assert_learned_alike(folder / "modern_two", folder / "modern_one")


def test_two_processes_learn_from_augmented_images_what_one_does(train, folder):
    keys = {
        "DATA.RANDAUGMENT": "[2, 9]", "DATA.ERASING": 0.25, "DATA.MIXUP": 0.8, "DATA.CUTMIX": 1.0,
    }  # fmt: skip
    for processes in (1, 2):
        train(f"augmented{processes}", processes=processes, **keys).succeed()
    assert_learned_alike(folder / "augmented1", folder / "augmented2")


def test_two_processes_learn_with_two_momenta_what_one_does(train, folder):
    for run, processes in (("dot_two", 2), ("dot_one", 1)):
        train(run, processes=processes, **{"DISTILL.DOT_DELTA": 0.075}).succeed()
    assert_learned_alike(folder / "dot_two", folder / "dot_one")
    states = [
        load_file(folder / run / "checkpoint.pth")["optimizer"]["state"]
        for run in ("dot_two", "dot_one")
    ]
    torch.testing.assert_close(*states, rtol=0, atol=0.02)
    assert max(velocity["taught"].abs().max() for velocity in states[0].values()) > 0.1


def test_no_process_waits_for_the_gradient_of_a_parameter_that_gets_none(train, folder):
    keys = {"STUDENT.NAME": "resnet8_masked", "TEACHER.NAME": "", "SOLVER.EPOCHS": 2}
    train("masked", "--method", "ce", processes=2, **keys).succeed()
    assert torch.equal(load_file(folder / "masked" / "model_last.pth")["mask_token"], torch.ones(3))


def test_a_killed_run_goes_on_with_any_number_of_processes(by_two, train, folder):
    """Killed while the teacher trains, then twice while the student does."""
    run = folder / "killed"
    teachers = folder / "killed_teachers"
    train("killed", processes=2).kill_when(lambda: any(teachers.glob("*/checkpoint.pth")))
    assert not list(teachers.glob("*.pth"))
    for processes, least in ((2, 1), (1, 2)):
        program = train("killed", "--resume", processes=processes)
        program.kill_when(lambda least=least: epochs_of(run) >= least)
        assert epochs_of(run) < EPOCHS
        assert (run / "model_last.pth").stat().st_size  # written before the checkpoint
    train("killed", "--resume", processes=2).succeed()
    assert (run / "model_best.pth").stat().st_size  # written after it: a kill may come between
    assert_learned_alike(run, by_two[0])
    assert json.loads((run / "result.json").read_text())["epochs"] == EPOCHS


def test_a_failure_of_the_first_process_ends_all(by_two, train):
    """It alone sees what is in the folder, and says so."""
    run, _ = by_two
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    began = time.monotonic()
    program = train("two", processes=2)
    assert program.wait() != 0
    assert time.monotonic() - began < 60
    assert program.log.read_text().count("ConfigError: OUTPUT_DIR: ") == 1
    assert "holds a run (checkpoint.pth, metrics.jsonl, result.json)" in program.log.read_text()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_three_processes_count_every_image_once(folder, start):
    """Of seven, shared out unevenly, and of two, which leave nothing for the third process."""
    script = folder / "evaluate.py"
    script.write_text(EVALUATION)
    printed = start(script, processes=3).succeed()
    assert printed.splitlines()[-1] == f"{round(300 / 7, 1)} {round(600 / 7, 1)} 50.0 100.0"


def test_processes_give_a_student_up_together(folder, start, digits_config):
    """The one beside it is trained to its end."""
    script = folder / "disagree.py"
    script.write_text(DISAGREEMENT)
    own = {
        "STUDENT.NAME": "resnet8",
        "TEACHER.NAME": "resnet8",
        "TEACHER.TRAIN": True,
        "TEACHER.CACHE_DIR": folder / "disagree_teachers",
    }
    words = [word for pair in {**SETTINGS, **own}.items() for word in pair]
    printed = start(script, digits_config, folder / "disagree", *words, processes=2).succeed()
    assert printed.count("epoch 1 is not finite at step 5: loss_ce=") == 2
    assert printed.count(f"DISTILL.WARMUP; {EPOCHS}") == 2
