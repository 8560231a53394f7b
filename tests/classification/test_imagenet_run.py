"""ImageNet's configuration from end to end, on a few images of a few classes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageDraw

from classification import evaluate, export
from pcka.engine.run_folder import read_metrics
from pcka.files import load_file

pytestmark = pytest.mark.slow

CLASSES = ("disc", "frame", "wedge")
TRAINING_IMAGES, TEST_IMAGES = 8, 5  # of each class; two processes share 15 test images unevenly


def draw(name, generator):
    """A shape of random colours on noise; no two images have one size."""
    width, height = generator.randint(225, 290, size=2)
    image = Image.fromarray(generator.randint(256, size=(height, width, 3), dtype=np.uint8))
    colour = tuple(int(value) for value in generator.randint(256, size=3))
    box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    pen = ImageDraw.Draw(image)
    if name == "disc":
        pen.ellipse(box, fill=colour)
    elif name == "frame":
        pen.rectangle(box, outline=colour, width=20)
    else:
        pen.polygon([(width // 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)
    return image


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """``train`` and ``val`` with one folder of JPEG files per class."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.RandomState(0)
    for split, images in (("train", TRAINING_IMAGES), ("val", TEST_IMAGES)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                draw(name, generator).save(folder / f"{number}.JPEG", quality=90)
    return root


@pytest.fixture(scope="module")
def arguments(root, tmp_path_factory, digits_config):
    """Of train.py; the teacher is a checkpoint as torchvision saves it."""
    folder = tmp_path_factory.mktemp("imagenet")
    torch.manual_seed(0)
    teacher = torchvision.models.resnet34(num_classes=len(CLASSES))
    torch.save(teacher.state_dict(), folder / "resnet34.pth")
    configs = digits_config.parents[1]
    values = {
        "OUTPUT_DIR": folder / "run",
        "DEVICE": "cpu",
        "DATA.ROOT": root,
        "DATA.NUM_CLASSES": len(CLASSES),
        "DATA.WORKERS": 1,
        "TEACHER.WEIGHTS": folder / "resnet34.pth",
        "TEACHER.ACCURACY": 0.0,
        "SOLVER.EPOCHS": 2,
        "REPORT": False,
        "SOLVER.BATCH_SIZE": 8,
        "SOLVER.BASE_LR": 0.01,
    }
    pairs = [str(word) for pair in values.items() for word in pair]
    return folder, ["--config-file", str(configs / "imagenet" / "resnet34_resnet18.yaml"), *pairs]


def test_two_processes_train_are_killed_resumed_evaluated_and_exported(start, arguments):
    folder, words = arguments
    run = folder / "run"
    train = ["classification/train.py", *words, "--method", "rcka", "--resume"]
    start(*train, processes=2).kill_when((run / "checkpoint.pth").exists)
    (first,) = read_metrics(run / "metrics.jsonl")
    assert load_file(run / "checkpoint.pth")["epoch"] == 1
    printed = start(*train, processes=2).succeed()
    assert "unused" not in printed and "Grad strides" not in printed

    before, last = read_metrics(run / "metrics.jsonl")
    assert before == first and (first["epoch"], last["epoch"]) == (1, 2)
    assert {"loss_ce", "loss_fcka_last", "loss_lcka_intra", "loss_lcka_inter"} < last.keys()
    assert {f"cka_stage{stage}" for stage in range(5)} < last.keys()
    result = json.loads((run / "result.json").read_text())
    assert (result["epochs"], result["evaluation_images"]) == (2, len(CLASSES) * TEST_IMAGES)

    weights = str(run / "model_last.pth")
    evaluated = evaluate.main([*words, "--weights", weights])
    assert evaluated == {"top1": pytest.approx(last["accuracy"])}

    exported = folder / "resnet18.pth"
    export.main([*words, "--weights", weights, "--output", str(exported)])
    student = torchvision.models.resnet18(num_classes=len(CLASSES))
    student.load_state_dict(torch.load(exported, weights_only=True))
