"""Transformers and networks for phones, trained on mixed images with drop path, small."""

from __future__ import annotations

import pytest
import torch

from classification import export
from classification.config import load_config
from classification.models import create_model
from classification.run import run_experiment
from pcka.engine.run_folder import read_metrics
from pcka.files import load_file

pytestmark = pytest.mark.slow

SIDE = 32
VIT = {
    "STUDENT.NAME": "timm/vit_tiny_patch16_224",
    "STUDENT.KWARGS": "{img_size: 32, patch_size: 8, depth: 3, embed_dim: 24, num_heads: 2,"
    " drop_path_rate: 0.5}",
}
MOBILE = {"STUDENT.NAME": "torchvision/mobilenet_v3_small"}
PAIRS = {"cnn to vit": (VIT, "resnet8"), "convnext to mobile": (MOBILE, "timm/convnext_atto")}
AUGMENTED = {
    "DATA.RANDAUGMENT": "[2, 9]", "DATA.ERASING": 0.25, "DATA.MIXUP": 0.8, "DATA.CUTMIX": 1.0,
    "DISTILL.CE.LABEL_SMOOTHING": 0.1, "DATA.IMAGE_SIZE": SIDE,
}  # fmt: skip


@pytest.fixture
def words(tiny_overrides, tmp_path):
    """``words(pair, name, KEY=value)``: what the command line says of a run."""
    pytest.importorskip("timm")

    def make(pair, name, **keys):
        student, teacher = PAIRS[pair]
        file = tmp_path / "teacher.pth"
        torch.manual_seed(0)
        torch.save(create_model(teacher, 10).state_dict(), file)
        given = {"TEACHER.NAME": teacher, "TEACHER.WEIGHTS": file, **student, **AUGMENTED, **keys}
        return tiny_overrides(name, **given)

    return make


@pytest.mark.usefixtures("without_plots")
def test_drop_path_is_live_in_training_and_drawn_from_the_kept_generator(
    words, digits_config, tmp_path, assert_same_run
):
    def trained(name, **keys):
        run_experiment(load_config(digits_config, words("cnn to vit", name, **keys), "kd"))
        return read_metrics(tmp_path / name / "metrics.jsonl")

    dropped, again = trained("dropped"), trained("again")
    assert_same_run(tmp_path / "dropped", tmp_path / "again")
    assert dropped[0]["loss_total"] == again[0]["loss_total"]
    without = VIT["STUDENT.KWARGS"].replace("0.5", "0.0")
    kept = trained("kept", **{"STUDENT.KWARGS": without})
    assert kept[0]["loss_total"] != dropped[0]["loss_total"]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_killed_run_goes_on_bit_for_bit_and_its_student_is_exported(
    pair, words, start, digits_config, tmp_path, assert_same_run
):
    onnxruntime = pytest.importorskip("onnxruntime")

    def train(name):
        command = ["classification/train.py", "--config-file", digits_config, "--method", "kd_fcka"]
        return start(*command, "--resume", *words(pair, name, **{"SOLVER.EPOCHS": 4}))

    train("whole").succeed()
    killed = tmp_path / "killed"
    program = train("killed")
    program.kill_when((killed / "checkpoint.pth").exists)
    assert 1 <= load_file(killed / "checkpoint.pth")["epoch"] < 4
    train("killed").succeed()
    assert_same_run(killed, tmp_path / "whole")

    cfg = load_config(killed / "config.yaml")
    weights = str(killed / "model_last.pth")
    path = export.export_student(cfg, weights, tmp_path / "student.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    settings = {"kwargs": dict(cfg.STUDENT.KWARGS), "role": "student"}
    student = export.load_classifier(cfg.STUDENT.NAME, weights, 10, **settings).eval()
    expected = student(images).detach()
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
