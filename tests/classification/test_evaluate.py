"""evaluate.py: on a student of the project's own, and on a checkpoint of the community."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from classification import evaluate, train

CONFIGS = Path(__file__).parents[2] / "configs" / "classification"
DATA = Path(os.environ.get("PCKA_TEST_DATA", "absent"))


def test_a_trained_student_is_measured_as_it_was_in_training(tmp_path):
    words = [
        "--config-file", str(CONFIGS / "digits" / "resnet20_resnet8.yaml"),
        "OUTPUT_DIR", str(tmp_path), "TEACHER.NAME", "", "DATA.TRAIN_IMAGES", "200",
        "DATA.IMAGE_SIZE", "16", "SOLVER.EPOCHS", "2", "SOLVER.EMA_DECAY", "0.9", "REPORT", "False",
    ]  # fmt: skip
    result = train.main(words)
    files = {"last": "last_accuracy", "best": "best_accuracy", "ema": "last_accuracy_ema"}
    for name, key in files.items():
        measured = evaluate.main([*words, "--weights", str(tmp_path / f"model_{name}.pth")])
        assert measured["top1"] == result[key]
        assert measured["top5"] >= measured["top1"]


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "checkpoints").is_dir() or not (DATA / "cifar10").is_dir(),
    reason="PCKA_TEST_DATA names no folder with cifar10/ and checkpoints/",
)
@pytest.mark.parametrize(
    ("model", "file", "expected"),
    [
        ("resnet20_option_a", "resnet20-12fca82f.th", 81.03),
        ("resnet56_option_a", "resnet56-4bfd9763.th", 83.20),
    ],
)
def test_community_checkpoints_on_cifar10_as_jpeg(model, file, expected):
    """Right only if the weights and the pixel statistics (ImageNet's) are."""
    measured = evaluate.main(
        [
            "--config-file",
            str(CONFIGS / "cifar10_folder" / "resnet56_resnet8.yaml"),
            "--role",
            "teacher",
            "--weights",
            str(DATA / "checkpoints" / file),
            "TEACHER.NAME",
            model,
            "DATA.ROOT",
            str(DATA / "cifar10"),
        ]
    )
    assert measured["top1"] == pytest.approx(expected, abs=0.005)
