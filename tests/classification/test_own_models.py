"""Runs of a model of one's own that is named by its import path: trained, resumed, used."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from classification import cka_map
from classification.config import load_config
from classification.evaluate import evaluate
from classification.export import export_student
from classification.run import run_experiment
from classification.train import main
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import read_metrics

ROOT = Path(__file__).parents[2]
MODULE = """
from torch import nn


class Tokens(nn.Module):
    def __init__(self, num_classes, width=6, depth=2):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True) for _ in range(depth)
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return {"tokens": tokens, "scores": self.head(tokens.mean(1))}
"""
WITH_WEIGHTS = """
import torch


def with_weights(num_classes, pretrained=False):
    model = Tokens(num_classes)
    if pretrained:  # these weights are always the same
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, generator=generator)
    return model
"""
OF_FIXED_OUTPUTS = """

def fixed(outputs):
    return Tokens(outputs)
"""


@pytest.fixture
def keys(tmp_path, monkeypatch, without_plots):
    """The module in the working folder, forgotten afterwards; what names it as the student."""
    (tmp_path / "tokens_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield {
        "STUDENT.NAME": "tokens_of_mine:Tokens",
        "STUDENT.KWARGS": "{'width': 8}",
        "STUDENT.LOGITS": "scores",
    }
    sys.modules.pop("tokens_of_mine", None)


def test_a_run_is_trained_resumed_evaluated_and_exported_from_its_own_folder(
    keys, pair_config, tmp_path
):
    given = {**keys, "DISTILL.AT.STAGES": "[last]", "DISTILL.AT.WEIGHTS": "[1.0]"}
    whole = run_experiment(pair_config("at", "whole", **given))
    assert (whole["student"], whole["epochs"]) == ("tokens_of_mine:Tokens", 2)
    folder = tmp_path / "whole"
    record = read_metrics(folder / "metrics.jsonl")[-1]
    assert record["loss_at_last"] > 0 and record["cka_stage2"] > 0

    cfg = load_config(folder / "config.yaml")
    assert (cfg.STUDENT.KWARGS, cfg.STUDENT.LOGITS) == ({"width": 8}, "scores")
    assert run_experiment(cfg, resume=True) == whole
    top1 = evaluate(cfg, weights=str(folder / "model_last.pth"))["top1"]
    assert top1 == pytest.approx(whole["last_accuracy"])
    path = export_student(cfg, str(folder / "model_last.pth"), tmp_path / "student.pth")
    assert torch.load(path)["patches.weight"].shape[0] == 8
    path = export_student(cfg, str(folder / "model_last.pth"), tmp_path / "student.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(["logits"], {"images": torch.zeros(3, 3, 16, 16).numpy()})
    assert logits.shape == (3, 10)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    keys, pair_config, tmp_path, assert_same_run
):
    def config(name, **more):
        steady = {"DISTILL.WARMUP": 0, "SOLVER.SCHEDULE": "multistep"}
        return pair_config("kd", name, **keys, **{**steady, **more})

    run_experiment(config("whole"))
    run_experiment(config("parts", **{"SOLVER.EPOCHS": 1}))
    run_experiment(config("parts"), resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_teacher_of_ones_own_is_trained_and_teaches(keys, tiny_config, tmp_path):
    given = {key.replace("STUDENT", "TEACHER"): value for key, value in keys.items()}
    given |= {"TEACHER.TRAIN": True, "STUDENT.NAME": "resnet8"}
    result = run_experiment(tiny_config("rcka_short", "taught", **given))
    assert result["teacher"] == "tokens_of_mine:Tokens"
    assert list((tmp_path / "teachers").glob("tokens_of_mine:Tokens-*.pth"))
    record = read_metrics(tmp_path / "taught" / "metrics.jsonl")[-1]
    assert all(record[f"loss_{name}"] > 0 for name in ("fcka_last", "lcka_intra", "lcka_inter"))


def test_a_teacher_that_comes_with_weights_teaches_as_it_is(
    keys, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens_of_mine.py").write_text(MODULE + WITH_WEIGHTS)
    given = {"TEACHER.NAME": "tokens_of_mine:with_weights", "TEACHER.LOGITS": "scores"}
    given["TEACHER.TRAIN"] = False
    cfg = tiny_config("kd", **given, **{"TEACHER.KWARGS": "{pretrained: true}"})
    result = run_experiment(cfg)
    assert evaluate(cfg, role="teacher")["top1"] == pytest.approx(result["teacher_accuracy"])
    with pytest.raises(ConfigError, match=r"TEACHER\.WEIGHTS: the teacher .* has no weights"):
        run_experiment(tiny_config("kd", "other", **given))


def test_the_taps_are_shown_and_nothing_is_trained(
    keys, digits_config, tiny_overrides, tmp_path, capsys
):
    words = tiny_overrides(**keys)
    assert main(["--config-file", str(digits_config), "--show-taps", *words]) == {}
    heading, *lines, note, way_out = capsys.readouterr().out.splitlines()
    assert heading.split() == [
        *("tap", "student:", "tokens_of_mine:Tokens", "shape", "teacher:", "resnet8", "shape")
    ]
    # A token has values of both signs; the teacher's stages end with a ReLU.
    assert note.endswith("last, pooled: below zero in the student only")
    assert "tap both at the same place (DISTILL.TAPS)" in way_out
    rows = {words[0]: words[1:] for words in map(str.split, lines)}
    assert " ".join(rows["last"]) == "blocks.1:map 8 x 4 x 4 layer3 64 x 4 x 4"
    assert rows["pooled"] == ["head:input", "8", "avgpool", "64"]
    assert not (tmp_path / "run").exists()


def test_a_size_that_a_model_does_not_take_is_refused_before_the_training(keys, tiny_config):
    with pytest.raises(ConfigError, match=r"STUDENT\.NAME: Tokens does not take images of 2 pix"):
        run_experiment(tiny_config("kd", **keys, **{"DATA.IMAGE_SIZE": 2, "TEACHER.TRAIN": True}))
    with pytest.raises(ConfigError, match=r"STUDENT\.LOGITS: Tokens returns dict .*tokens, scores"):
        run_experiment(tiny_config("ce", **{**keys, "STUDENT.LOGITS": ""}))


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("logits", [3, 20])
def test_a_model_without_one_logit_for_each_class_is_refused_before_it_trains(
    keys, tiny_config, tmp_path, role, logits
):
    """Fewer end in an index that is out of range, more train with logits of no class."""
    (tmp_path / "tokens_of_mine.py").write_text(MODULE + OF_FIXED_OUTPUTS)
    key = role.upper()
    given = {"NAME": "tokens_of_mine:fixed", "KWARGS": f"{{outputs: {logits}}}", "LOGITS": "scores"}
    given = {f"{key}.{name}": value for name, value in given.items()}
    if role == "student":
        given["TEACHER.NAME"] = ""
    message = rf"^{key}\.NAME: .*:fixed returns \(2, {logits}\) for 2 .* 10 classes; .* num_classes"
    with pytest.raises(ConfigError, match=message):
        run_experiment(tiny_config("kd" if role == "teacher" else "ce", **given))
    assert not (tmp_path / "teachers").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_model_of_the_documentation_is_trained_and_its_taps_are_those_shown(
    digits_config, tiny_overrides, tmp_path, monkeypatch, capsys, without_plots
):
    page = (ROOT / "docs" / "classification.md").read_text()
    section = page.partition("### Your own model")[2]
    code, _, shown = re.findall(r"```\w*\n(.*?)```", section, re.DOTALL)[:3]
    (tmp_path / "my_net.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    given = ["STUDENT.NAME", "my_net:small", "STUDENT.KWARGS", "{width: 24}"]
    try:
        main(["--config-file", str(digits_config), "--show-taps", *given])
        assert capsys.readouterr().out.split() == shown.split()
        words = tiny_overrides(**{"TEACHER.TRAIN": True, "SOLVER.EPOCHS": 1})
        file = ["--config-file", str(digits_config), "--method", "rcka_short"]
        assert main([*file, *words, *given])["student"] == "my_net:small"
        run = words[words.index("OUTPUT_DIR") + 1]
        table = cka_map.main(["--a", run, "--output", str(tmp_path / "cka")])
        torch.testing.assert_close(table.values.diagonal(), torch.ones_like(table.values[0]))
    finally:
        sys.modules.pop("my_net", None)
