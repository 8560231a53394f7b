"""A user's own loss, model and data set, from a module that IMPORTS names."""

from __future__ import annotations

import sys

import pytest
import torch

from classification.config import load_config
from classification.data import register as register_data
from classification.data.source import _SOURCES
from classification.evaluate import evaluate
from classification.models import create_model
from classification.models import register as register_model
from classification.models.registry import _CONSTRUCTORS
from classification.run import run_experiment
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import read_metrics
from pcka.losses import registry

MODULE = """
import numpy as np
import torch
from torch import nn

from classification.data import Source, register as register_data
from classification.models import register as register_model
from pcka import losses


@register_model("tiny_of_mine")
class Tiny(nn.Sequential):
    stage_names = ("0", "2")

    def __init__(self, num_classes):
        conv = nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1)
        super().__init__(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


@register_data("colours_of_mine")
def colours(data, split):
    labels = np.arange(40) % 2
    shape = (3, data.IMAGE_SIZE, data.IMAGE_SIZE)
    read = lambda chosen: torch.stack(
        [torch.full(shape, 100 + 50 * int(labels[i]), dtype=torch.uint8) for i in chosen]
    )
    return Source(labels, ("dark", "light"), read)


@losses.register("SHRINK_MINE")
class Shrink(losses.Loss):
    needs_teacher, needs_logits = False, True

    def __init__(self, *, weight: float = 0.01):
        super().__init__()
        self.weight = weight

    def terms(self, student, teacher, target):
        return {"loss_shrink": losses.Term(self.weight, student.logits.square().mean())}
"""
KEYS = {
    "DATA.NAME": "colours_of_mine", "DATA.IMAGE_SIZE": 8, "STUDENT.NAME": "tiny_of_mine",
    "SOLVER.EPOCHS": 1, "SOLVER.BATCH_SIZE": 10, "DISTILL.METHODS": "[CE, SHRINK_MINE]",
    "REPORT": False,
    "DISTILL.SHRINK_MINE.WEIGHT": 0.5, "DEVICE": "cpu", "DATA.CROP_PADDING": 0,
}  # fmt: skip


@pytest.fixture
def my_parts(tmp_path, monkeypatch):
    """The module in the working folder, forgotten afterwards."""
    (tmp_path / "my_parts.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "my_parts"
    sys.modules.pop("my_parts", None)
    _SOURCES.pop("colours_of_mine", None)
    _CONSTRUCTORS.pop("tiny_of_mine", None)
    registry._REGISTERED.pop("SHRINK_MINE", None)


def config(**keys):
    return load_config(None, [str(word) for pair in {**KEYS, **keys}.items() for word in pair])


def test_a_run_trains_a_model_of_ones_own_on_data_and_by_a_loss_of_ones_own(my_parts, tmp_path):
    result = run_experiment(config(IMPORTS=f"[{my_parts}]", OUTPUT_DIR=tmp_path / "run"))
    assert (result["student"], result["training_images"]) == ("tiny_of_mine", 40)
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert record["loss_shrink"] > 0
    assert load_config(tmp_path / "run" / "config.yaml").DISTILL.SHRINK_MINE.WEIGHT == 0.5


def test_a_model_of_other_classes_than_the_data_is_refused(my_parts, tmp_path):
    (tmp_path / "my_parts.py").write_text(
        MODULE.replace("nn.Linear(4, num_classes)", "nn.Linear(4, 3)")
    )
    told = r"^STUDENT.NAME: tiny_of_mine returns \(2, 3\) for 2 images, expected logits \(2, 2\)"
    cfg = config(IMPORTS=f"[{my_parts}]", OUTPUT_DIR=tmp_path / "run")
    with pytest.raises(ConfigError, match=told):
        run_experiment(cfg)
    torch.save(create_model("tiny_of_mine", 2).state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(ConfigError, match=told):
        evaluate(cfg, weights=str(tmp_path / "tiny.pth"))


def test_a_module_that_cannot_be_imported_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"^IMPORTS: 'no_such_parts' cannot be imported \(No mod"):
        config(IMPORTS="[no_such_parts]")


def test_a_data_set_that_nobody_registered_is_refused_with_near_names():
    words = ["STUDENT.NAME", "resnet8", "DATA.NAME", "cifar"]
    with pytest.raises(ConfigError, match=r"^DATA\.NAME: unknown data set 'cifar'; near .*10"):
        load_config(None, words)


@pytest.mark.parametrize("name", ["digits", "cifar100"])
def test_a_name_that_the_project_has_is_taken_before_it_is_imported(name):
    with pytest.raises(ValueError, match=f"a data set '{name}' is already registered"):
        register_data(name)(lambda data, split: None)
    with pytest.raises(ValueError, match="got 'vgg8'"):
        register_model("vgg8")(lambda num_classes: None)


def test_the_modules_of_the_pair_the_method_and_the_command_line_add_up(my_parts, tmp_path):
    (tmp_path / "methods").mkdir()
    method = "IMPORTS: [my_parts]\nDISTILL: {METHODS: [CE, SHRINK_MINE]}\n"
    (tmp_path / "methods" / "shrink.yaml").write_text(method)
    pair = tmp_path / "pair.yaml"
    pair.write_text("IMPORTS: [json]\nDATA: {NAME: digits}\nSTUDENT: {NAME: tiny_of_mine}\n")
    cfg = load_config(pair, ["IMPORTS", "[csv, json]"], method="shrink")
    assert cfg.IMPORTS == ["my_parts", "json", "csv"]  # what a saved configuration is read by
