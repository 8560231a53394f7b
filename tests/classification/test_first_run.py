"""A run from a folder of images and two names."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from classification import train
from classification.arguments import compare_parser
from classification.config import load_config, method_files
from classification.first_run import BASELINE, DEFAULT_METHOD, batch_size, epochs_for, propose
from classification.model_pixels import (
    Statistics,
    likeliest_statistics,
    measured_statistics,
    stated_statistics,
)
from classification.models import create_model
from classification.pair import pair_settings
from pcka.engine.config import ConfigError, read_leaves

CLASSES = ("dark", "light")


@pytest.fixture
def make_images(tmp_path):
    """``make_images(folder, count, size)``: so many noisy images of each of two classes."""

    def make(folder="train", count=10, size=(40, 36)):
        noise = np.random.RandomState(0)
        for shade, name in enumerate(CLASSES):
            path = tmp_path / "images" / folder / name
            path.mkdir(parents=True)
            for number in range(count):
                pixels = noise.randint(0, 120, (size[1], size[0], 3)) + 120 * shade
                Image.fromarray(pixels.astype(np.uint8)).save(path / f"{number}.png")
        return tmp_path / "images"

    return make


def save_teacher(path, classes=2):
    torch.manual_seed(0)
    path.parent.mkdir(exist_ok=True)
    torch.save(create_model("resnet8", classes).state_dict(), path)
    return str(path)


def test_a_folder_without_test_images_has_some_held_out_and_says_so(make_images):
    settings, notes = propose(make_images(), "resnet8")
    assert settings["DATA.HOLDOUT"] == 4
    assert "without a test or val part, 4 of them are held out" in notes[0]


def test_a_folder_with_test_images_is_taken_as_it_is(make_images):
    make_images("val", 3)
    settings, notes = propose(make_images(), "resnet8")
    assert "DATA.HOLDOUT" not in settings
    assert notes[0] == "data: 20 images of 2 classes"


def test_class_folders_alone_are_a_set_too(make_images):
    settings, _ = propose(make_images("."), "resnet8")
    assert settings["DATA.HOLDOUT"] == 4


@pytest.mark.parametrize(
    ("size", "side"),
    [((20, 28), 32), ((50, 70), 48), ((110, 90), 96), ((640, 480), 224)],
)
def test_the_side_is_that_of_the_files_rounded(make_images, size, side):
    settings, _ = propose(make_images(size=size, count=3), "resnet8")
    assert settings["DATA.IMAGE_SIZE"] == side
    assert settings["DATA.CROP_PADDING"] == side // 8
    assert settings["DATA.STREAM"] is False


def test_a_set_beyond_the_memory_is_streamed(make_images):
    settings, notes = propose(
        make_images(size=(300, 224), count=3), "resnet8", overrides=["DATA.MEMORY_GB", "1e-4"]
    )
    assert settings["DATA.STREAM"] is True
    assert settings["DATA.RESIZE"] == 256
    assert "streamed from their files" in notes[1]


def test_a_model_that_takes_one_size_alone_has_it(make_images, tmp_path, monkeypatch):
    (tmp_path / "one_size.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings, notes = propose(make_images(size=(70, 64)), "one_size:net")
    assert settings["DATA.IMAGE_SIZE"] == 32
    assert "a model accepts no other" in notes[1]


def test_keys_of_the_command_line_stay_and_the_others_follow_them(make_images):
    words = ["SOLVER.EPOCHS", "40", "SOLVER.BATCH_SIZE", "64", "DATA.HOLDOUT", "2", "SEED", "3"]
    settings, notes = propose(make_images(), "resnet8", overrides=words)
    assert not settings.keys() & {"SOLVER.EPOCHS", "SOLVER.BATCH_SIZE", "DATA.HOLDOUT", "SEED"}
    assert settings["SOLVER.WARMUP_EPOCHS"] == 2.0
    assert settings["SOLVER.BASE_LR"] == pytest.approx(0.05)
    assert "2 of them are held out" in notes[0]


def test_batch_and_epochs_suit_a_thousand_images_and_a_million():
    few, many = 800, 1_280_000
    assert batch_size(few) == 32
    assert batch_size(many) == 256
    assert epochs_for(few) > epochs_for(50_000) > epochs_for(many) >= 30
    assert batch_size(2) == 16 and epochs_for(2) == 100


def test_batch_norms_that_follow_too_slowly_are_quickened(make_images):
    settings, notes = propose(make_images(), "torchvision/mobilenet_v3_small", teacher="resnet8")
    assert settings["STUDENT.BN_MOMENTUM"] == 0.1
    assert "TEACHER.BN_MOMENTUM" not in settings  # has the usual one
    assert any("STUDENT.BN_MOMENTUM 0.1: the model's own, 0.01" in note for note in notes)
    words = ["STUDENT.BN_MOMENTUM", "0.0"]
    settings, _ = propose(make_images("again"), "torchvision/mobilenet_v3_small", overrides=words)
    assert "STUDENT.BN_MOMENTUM" not in settings


ADAMW = {
    "SOLVER.OPTIMIZER": "adamw", "SOLVER.BASE_LR": 1e-3,
    "SOLVER.WEIGHT_DECAY": 0.05, "SOLVER.DECAY_NORMS_AND_BIASES": False,
    "SOLVER.CLIP_GRADIENTS": 1.0, "SOLVER.SCHEDULE": "cosine", "SOLVER.WARMUP_EPOCHS": 5.0,
}  # fmt: skip
SGD = {
    "SOLVER.BASE_LR": 0.0125, "SOLVER.SCHEDULE": "cosine", "SOLVER.WARMUP_EPOCHS": 5.0,
    "SOLVER.BATCH_SIZE": 16, "SOLVER.EPOCHS": 100,
}  # fmt: skip


def of_solver(settings):
    return {key: value for key, value in settings.items() if key.startswith("SOLVER.")}


@pytest.fixture
def layer_norms(tmp_path, monkeypatch):
    """Name of a model with a layer norm, as those of transformers."""
    (tmp_path / "layer_norms.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    pool = nn.AdaptiveAvgPool2d(1)\n"
        "    return nn.Sequential(pool, nn.Flatten(), nn.LayerNorm(3), nn.Linear(3, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "layer_norms:net"


def test_a_student_without_batch_norms_is_trained_by_adamw(make_images, layer_norms):
    settings, notes = propose(make_images(), layer_norms)
    assert of_solver(settings) == {**SGD, **ADAMW}
    (note,) = [note for note in notes if note.startswith("training: ")]
    assert "OPTIMIZER adamw (no batch norm in the student)" in note
    assert "BASE_LR 0.001, WEIGHT_DECAY 0.05, CLIP_GRADIENTS 1, SCHEDULE cosine" in note


def test_so_is_a_teacher_without_them_that_is_trained_first_and_its_student_with_it(
    make_images, layer_norms, tmp_path
):
    images = make_images()
    settings, notes = propose(images, "resnet8", teacher=layer_norms)
    assert settings["SOLVER.OPTIMIZER"] == "adamw"
    assert any("(no batch norm in the teacher)" in note for note in notes)
    torch.save(create_model(layer_norms, 2).state_dict(), weights := tmp_path / "teacher.pth")
    settings, _ = propose(images, "resnet8", teacher=layer_norms, weights=str(weights))
    assert of_solver(settings) == SGD


def test_models_with_batch_norms_are_trained_by_sgd(make_images):
    settings, notes = propose(make_images(), "resnet8", teacher="torchvision/mobilenet_v3_small")
    assert of_solver(settings) == SGD
    assert any("BATCH_SIZE 16, BASE_LR 0.0125, SCHEDULE cosine" in note for note in notes)


@pytest.mark.parametrize(("method", "words"), [("kd_dot", ()), ("kd", ("SOLVER.OPTIMIZER", "sgd"))])
def test_sgd_stays_where_it_is_asked_for_or_a_method_is_made_of_it(
    make_images, layer_norms, tmp_path, method, words
):
    weights = save_teacher(tmp_path / "teacher.pth")
    given = {"teacher": "resnet8", "weights": weights, "method": method, "overrides": words}
    settings, _ = propose(make_images(), layer_norms, **given)
    assert of_solver(settings) == SGD


def test_adamw_that_is_asked_for_gets_a_rate_of_its_own(make_images):
    words = ["SOLVER.OPTIMIZER", "adamw", "SOLVER.WEIGHT_DECAY", "0.1"]
    settings, notes = propose(make_images(), "resnet8", overrides=words)
    assert settings["SOLVER.BASE_LR"] == 1e-3
    assert "SOLVER.WEIGHT_DECAY" not in settings
    assert any("OPTIMIZER adamw, BASE_LR 0.001, WEIGHT_DECAY 0.1" in note for note in notes)


def test_so_few_images_are_one_batch(make_images):
    settings, _ = propose(make_images(count=5), "resnet8")
    assert settings["SOLVER.BATCH_SIZE"] == 8  # of ten, two are held out


def test_a_pair_without_weights_has_the_pixels_measured_and_its_teacher_trained(make_images):
    settings, notes = propose(make_images(), "resnet8", teacher="resnet8")
    images = [Image.open(path) for path in sorted(make_images("again").glob("again/*/*.png"))]
    assert settings["TEACHER.TRAIN"] is True
    assert settings["TEACHER.EPOCHS"] == settings["SOLVER.EPOCHS"]
    assert settings["TEACHER.PIXEL_MEAN"] == settings["STUDENT.PIXEL_MEAN"]
    mean = np.mean([np.asarray(image) for image in images]) / 255
    assert settings["STUDENT.PIXEL_MEAN"] == pytest.approx([mean] * 3, abs=0.02)
    assert any(note.startswith("teacher: has no weights") and "first" in note for note in notes)


def test_a_teacher_with_weights_is_not_trained(make_images, tmp_path):
    weights = save_teacher(tmp_path / "teacher.pth")
    settings, notes = propose(make_images(), "resnet8", teacher="resnet8", weights=weights)
    assert settings["TEACHER.TRAIN"] is False
    assert not any(note.startswith("teacher:") for note in notes)


def test_a_run_says_what_its_model_was_trained_with(make_images, tmp_path):
    weights = save_teacher(tmp_path / "run" / "model_best.pth")
    words = ["STUDENT.NAME", "resnet8", "STUDENT.PIXEL_MEAN", "[0.1, 0.2, 0.3]"]
    cfg = load_config({"DATA.NAME": "digits", "DATA.IMAGE_SIZE": 48}, words)
    (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
    settings, notes = propose(make_images(), "resnet14", teacher="resnet8", weights=weights)
    assert settings["TEACHER.PIXEL_MEAN"] == [0.1, 0.2, 0.3]
    assert settings["STUDENT.PIXEL_MEAN"] != [0.1, 0.2, 0.3]
    assert settings["DATA.IMAGE_SIZE"] == 48
    assert "what the teacher was trained with" in notes[1]
    # A configuration of another model says nothing.
    settings, _ = propose(
        make_images("again"), "resnet8", teacher="resnet14", overrides=["TEACHER.TRAIN", "True"]
    )
    assert settings["DATA.IMAGE_SIZE"] == 32


def test_timm_and_transformers_state_the_statistics_of_their_weights(tmp_path):
    pytest.importorskip("timm")
    section = {"NAME": "timm/resnet10t", "WEIGHTS": "w.pth", "KWARGS": {}, "LOGITS": ""}
    stated = stated_statistics(section)
    assert stated is not None and stated.mean == pytest.approx([0.485, 0.456, 0.406])
    folder = {**section, "NAME": f"hf/{tmp_path}", "WEIGHTS": ""}
    assert stated_statistics(folder) is None
    content = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    stated = stated_statistics(folder)
    assert stated is not None and stated.mean == [0.5, 0.4, 0.3]


@pytest.mark.parametrize("teacher", ["timm/resnet10t", "torchvision/resnet18"])
def test_a_pretrained_model_of_other_classes_has_to_learn_these(make_images, teacher):
    pytest.importorskip("timm")
    words = ["TEACHER.KWARGS", "{pretrained: true}"]
    settings, _ = propose(make_images(), "resnet8", teacher=teacher, overrides=words)
    assert settings["TEACHER.TRAIN"] is True
    assert settings["TEACHER.PIXEL_MEAN"] == pytest.approx([0.485, 0.456, 0.406])


def test_what_timm_states_is_not_taken_for_a_file_of_other_weights(make_images, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    given = {"teacher": "timm/resnet10t", "weights": str(tmp_path / "own.pth")}
    _, notes = propose(make_images(), "resnet8", **given)
    (told,) = [note for note in notes if note.startswith("pixel statistics")]
    assert "training images correct" in told  # tried, timm's among others


class Thresholds(nn.Module):
    """Two classes of which the second is above 0.5, if pixels come as they are."""

    def forward(self, images):
        grey = images.mean((1, 2, 3))
        return 20 * torch.stack([0.5 - grey, grey - 0.5], 1)


def test_statistics_that_nobody_states_are_those_that_the_weights_fit():
    shades = torch.tensor([90, 110, 120, 135, 145, 150], dtype=torch.uint8)
    pixels = shades.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    labels = (shades > 127).long()
    found = likeliest_statistics(Thresholds(), pixels, labels, [measured_statistics(pixels)])
    assert found[:2] == ([0.0] * 3, [1.0] * 3)
    assert "100 % of 6 training images correct" in found.source


def test_images_of_one_grey_have_a_deviation_to_divide_by():
    assert measured_statistics(torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)) == Statistics(
        [0.2] * 3, [0.01] * 3, "measured on 2 training images"
    )


def test_the_methods_that_are_proposed_exist():
    assert {DEFAULT_METHOD, BASELINE} <= method_files().keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"--data and --student: expected --config-file F .* or --data FOLDER"),
        (["--data", "images"], "--student: expected --config-file F"),
        (["--config-file", "F", "--teacher", "resnet8"], "--teacher: replace --config-file"),
        (["--data", ".", "--student", "resnet8", "--weights", "w"], "name its model with"),
        (["--data", "absent", "--student", "resnet8"], "expected the folder absent/train"),
    ],
)
def test_what_is_missing_or_too_much_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        train.main(words)


def test_one_command_trains_saves_its_settings_and_goes_on(
    make_images, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "pcka")
    images = make_images()
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(images), "--teacher", "resnet8", "--student", "resnet8"]
    words += ["SOLVER.EPOCHS", "2", "DEVICE", "cpu", "REPORT", "False"]
    result = train.main(words)
    assert (result["methods"], result["epochs"]) == (["CE", "KD", "FCKA"], 2)
    assert (result["training_images"], result["evaluation_images"]) == (16, 4)
    run = tmp_path / "output" / "images-resnet8-kd_fcka"
    saved = read_leaves(run / "config.yaml")
    assert saved["DATA.HOLDOUT"] == 4 and saved["TEACHER.TRAIN"] is True
    assert "method: kd_fcka (--method M; --list prints them)" in caplog.messages
    caplog.clear()
    assert train.main([*words, "--resume"]) == result
    assert any(text.startswith("already finished: accuracy") for text in caplog.messages)


def test_a_comparison_has_no_method_of_its_own_to_tell_of(make_images, caplog):
    caplog.set_level("INFO", "pcka")
    words = ["--data", str(make_images()), "--student", "resnet8", "--methods", "ce"]
    pair_settings(compare_parser().parse_args(words), [])
    assert any(text.startswith("training: ") for text in caplog.messages)
    assert not any(text.startswith("method: ") for text in caplog.messages)


def test_a_run_that_is_not_there_to_resume_is_told_of(make_images, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "pcka")
    monkeypatch.setattr(train, "run_experiment", lambda cfg, resume: resume)
    words = ["--data", str(make_images()), "--student", "resnet8", "--resume"]
    assert train.main([*words, "OUTPUT_DIR", str(tmp_path / "typo")])
    assert f"{tmp_path / 'typo'}: nothing to resume; starting a new run" in caplog.messages


def test_a_student_without_a_teacher_learns_by_cross_entropy(make_images, monkeypatch):
    monkeypatch.setattr(train, "run_experiment", lambda cfg, resume: cfg)
    cfg = train.main(["--data", str(make_images()), "--student", "resnet8"])
    assert (cfg.DISTILL.METHODS, cfg.TEACHER.NAME) == (["CE"], "")
    assert cfg.OUTPUT_DIR == "output/images-resnet8-ce"
