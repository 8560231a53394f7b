"""``pcka cka``: models by name and by run, images by folder and by name."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from classification import cka_map
from classification.config import load_config
from classification.data import load_evaluation_set
from classification.models import create_model
from classification.run import run_experiment
from pcka import cli
from pcka.analysis import cka_matrix
from pcka.engine.config import ConfigError

ROOT = Path(__file__).parents[2]
DIGITS = ("--a", "resnet8", "--data", "digits")


@pytest.fixture
def compare(tmp_path):
    """``compare(*words)``: the table of ``pcka cka`` with its files below ``tmp_path``."""

    def run(*words: object):
        return cli.main(["cka", "--output", str(tmp_path / "out" / "map"), *map(str, words)])

    return run


def test_two_models_on_the_digits(compare, tmp_path, random_teacher, capsys):
    words = [
        "--a",
        "resnet8",
        "--weights-a",
        random_teacher,
        "--b",
        "resnet8x4",
        "--data",
        "digits",
    ]
    table = compare(*words, "--images", 40, "--image-size", 8, "--layers", "layer*.conv1", "fc")
    assert table.layers_a == tuple([*(f"layer{n}.0.conv1" for n in (1, 2, 3)), "fc"])
    assert capsys.readouterr().out.startswith("CKA of 4 x 4 layers on 40 images: ")
    with open(tmp_path / "out" / "map.csv", newline="") as file:
        assert next(csv.reader(file)) == ["layer", *table.layers_b]
    with Image.open(tmp_path / "out" / "map.png") as picture:
        assert min(picture.size) > 200


def test_runs_bring_weights_statistics_and_images(compare, tiny_config, without_plots):
    runs = []
    for name, student in (("one", "resnet8"), ("two", "resnet14")):
        cfg = tiny_config("ce", name, **{"STUDENT.NAME": student, "SOLVER.EPOCHS": 1})
        run_experiment(cfg)
        runs.append(Path(cfg.OUTPUT_DIR))
    table = compare("--a", runs[0], "--b", runs[1], "--layers", "layer?")

    cfg = load_config(runs[0] / "config.yaml")
    images = [images for images, *_ in load_evaluation_set(cfg).evaluation_batches(40)]
    models = []
    for run, name in zip(runs, ("resnet8", "resnet14")):
        model = create_model(name, 10)
        model.load_state_dict(torch.load(run / "model_last.pth", weights_only=True))
        models.append(model)
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (cfg.STUDENT.PIXEL_MEAN, cfg.STUDENT.PIXEL_STD)
    )
    expected = cka_matrix(*models, [(x - mean) / std for x in images], "layer?", "layer?")
    torch.testing.assert_close(table.values, expected.values, rtol=1e-4, atol=1e-5)


def test_a_folder_of_images_at_any_depth_and_a_model_with_itself(compare, tmp_path, random_teacher):
    for index in range(6):
        path = tmp_path / "images" / f"{index % 2}" / f"{index}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (20, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(path)
    (tmp_path / "linked").mkdir()
    for name in ("0", "1"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "images" / name)
    table = compare(
        *("--a", "resnet8", "--weights-a", random_teacher, "--data", tmp_path / "linked"),
        *("--image-size", 16, "--layers-b", "layer?"),
    )
    assert table.layers_b == ("layer1", "layer2", "layer3")
    assert len(table.layers_a) > 20 and table.layers_a[-1] == "fc"
    diagonal = table.values[table.layers_a.index("layer1.0.relu"), 0]
    assert diagonal.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--a", "resnet8"], "--data: expected a folder of images, or digits"),
        (["--a", "resnet8", "--data", "nowhere"], "--data: no images in 'nowhere'"),
        (["--a", "resnet9", "--data", "digits"], r"--a: .*did you mean resnet8"),
        ([*DIGITS, "--images", "3"], "^--images: CKA needs at least 4, got 3"),
        ([*DIGITS, "--batch-size", "2"], "^--batch-size: CKA needs at least 4, got 2"),
        ([*DIGITS, "--pixel-std", "0", "1", "1"], "^--pixel-mean and --pixel-std: .* above 0"),
        ([*DIGITS, "--pixel-std", "nan", "1", "1"], "^--pixel-mean and --pixel-std: .* finite"),
        ([*DIGITS, "--output", "maps/"], "^--output: expected the name of a file .* got 'maps/'"),
        ([*DIGITS, "--output", "/proc/x/map"], r"^--output: .*No such file"),
        ([*DIGITS, "--layers", "x*"], "no layer of .* matches 'x\\*'"),
        ([*DIGITS, "--layers", "x"], "has no module 'x'"),
    ],
)
def test_refusals_in_one_line(compare, words, message):
    with pytest.raises(ConfigError, match=message):
        compare(*words)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--images", -1), ("--batch-size", 0), ("--image-size", -3), ("--classes", 0)],
)
def test_numbers_below_one_are_refused_by_the_option(compare, capsys, option, value):
    with pytest.raises(SystemExit):
        compare("--a", "resnet8", "--data", "digits", option, value)
    assert f"argument {option}: expected at least 1, got {value}" in capsys.readouterr().err


def test_one_model_with_two_weights(compare, tmp_path, random_teacher):
    torch.manual_seed(1)
    torch.save(create_model("resnet8", 10).state_dict(), tmp_path / "b.pth")
    words = [*DIGITS, "--weights-a", random_teacher, "--images", 40, "--layers", "layer?"]
    table = compare(*words, "--weights-b", tmp_path / "b.pth", "--output", tmp_path / "two.png")
    assert table.values.diagonal().max() < 0.999
    assert {path.name for path in tmp_path.glob("two*")} == {"two.png", "two.csv"}


def test_weights_of_another_model_are_refused_by_the_option(compare, random_teacher):
    with pytest.raises(ConfigError, match=r"^--weights-a: .* is not the checkpoint of a resnet14"):
        compare("--a", "resnet14", "--weights-a", random_teacher, "--data", "digits")


def test_the_command_ends_with_one_line_and_its_status(tmp_path):
    call = [sys.executable, "-c", "from pcka.cli import script; script()", "cka", "--a", "resnet8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(call, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: --data: ") and ended.stderr.count("\n") == 1


def test_without_the_trainers_the_command_says_how_to_get_them(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "cka", ("no_such_trainers.cka_map", ""))
    with pytest.raises(ImportError, match=r"no module named 'no_such_trainers'.*pip install -e"):
        cli.main(["cka"])


def test_a_detectors_run_without_detectron2_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("MODEL: {META_ARCHITECTURE: RetinaNet}")

    def lack(name):
        if name == "detection.grams":
            raise ModuleNotFoundError("no", name="detectron2")
        return imported(name)

    imported = cli.importlib.import_module
    monkeypatch.setattr(cli.importlib, "import_module", lack)
    with pytest.raises(ImportError, match=r"detectron2; run pip install .*install_detectron2\.py"):
        cli.main(["grams", "--taps", "p3", "--", str(tmp_path)])


def test_every_subcommand_has_its_module():
    assert set(cli.COMMANDS) == {"cka", "doctor", "epochs", "grams", "report"}
    assert cka_map.main.__module__ == cli.module_of("cka", [])
    for command in ("doctor", "grams", "report"):
        assert cli.module_of(command, []) == f"classification.{command}"


@pytest.mark.parametrize(
    ("trainer", "saved"), [("classification", "DATA: {}"), ("detection", "MODEL: {}")]
)
def test_a_configuration_says_whose_subcommand_is_meant(trainer, saved, tmp_path):
    file = next((ROOT / "configs" / trainer).glob("digits/*.yaml"))
    given = ["SEED", "1", "--config-file", str(file)]
    assert cli.module_of("doctor", given) == f"{trainer}.doctor"
    (tmp_path / "config.yaml").write_text(saved)
    for command in ("grams", "report"):
        assert cli.module_of(command, ["--device", "cpu", str(tmp_path)]) == f"{trainer}.{command}"
