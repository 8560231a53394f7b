"""A teacher's outputs on disk: the same training, bit for bit, without running the teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from classification.data import ResidentSet
from classification.lessons import Lessons
from classification.models import create_model
from classification.run import run_experiment
from classification.sweep import run_side_by_side
from classification.teacher_outputs import EpochOutputs, _manifest
from classification.trainer import Trainer
from pcka.engine.config import ConfigError
from pcka.losses import Outputs

pytestmark = pytest.mark.usefixtures("without_plots")

PROGRAM = "classification/train.py"


@pytest.fixture
def kept_config(pair_config, tmp_path):
    """``kept_config(method, name, KEY=value)``: a run with the outputs in ``tmp_path/outputs``."""

    def config(method="kd", name="kept", **keys):
        return pair_config(method, name, **{"TEACHER.OUTPUTS": tmp_path / "outputs", **keys})

    return config


@pytest.fixture
def without_teacher(monkeypatch):
    """The teacher may be evaluated, and tried on some images; asked in a step it fails."""

    def refuse(*_):
        raise AssertionError("the teacher was asked")

    def forbid():
        monkeypatch.setattr(Lessons, "_answer", refuse)

    return forbid


@pytest.fixture
def asked(monkeypatch):
    """How many images the teacher was asked about, batch by batch."""
    batches, answer = [], Lessons._answer

    def counted(self, images):
        batches.append(len(images))
        return answer(self, images)

    monkeypatch.setattr(Lessons, "_answer", counted)
    return batches


@pytest.fixture
def image_folder(tmp_path):
    """``DATA`` keys of a folder that is streamed: 10 classes, 30 images to train on."""
    generator = np.random.default_rng(0)
    for split, images in (("train", 3), ("test", 1)):
        for label in "abcdefghij":
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return {
        "DATA.NAME": "folder", "DATA.ROOT": tmp_path / "images", "DATA.STREAM": True,
        "DATA.WORKERS": 0, "DATA.CROP_PADDING": 0, "DATA.HOLDOUT": 0, "DATA.TRAIN_IMAGES": 0,
    }  # fmt: skip


def parts(folder: Path) -> dict[str, list[int]]:
    """Folder of an epoch -> the images in each of its files."""
    found: dict[str, list[int]] = {}
    for file in sorted(folder.rglob("*.pth")):
        content = torch.load(file, weights_only=True)
        found.setdefault(str(file.parent.relative_to(folder)), []).append(len(content["indices"]))
    return found


# KD reads logits, SRRL the pooled features too, FCKA and OFD maps of one stage and of all.
@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("kd", {}),
        ("srrl", {}),
        ("kd_fcka", {"CHANNELS_LAST": True}),
        ("ofd", {"AUTOCAST": "bfloat16"}),
    ],
)
def test_a_training_from_disk_is_the_one_with_the_teacher_bit_for_bit(
    kept_config, pair_config, tmp_path, assert_same_run, without_teacher, method, keys
):
    run_experiment(pair_config(method, "live", **keys))
    run_experiment(kept_config(method, "first", **keys))
    without_teacher()
    run_experiment(kept_config(method, "second", **keys))
    assert_same_run(tmp_path / "first", tmp_path / "live")
    assert_same_run(tmp_path / "second", tmp_path / "live")


def test_a_streamed_training_from_disk_is_the_same_too(
    kept_config, pair_config, tmp_path, assert_same_run, without_teacher, image_folder
):
    run_experiment(pair_config("kd", "live", **image_folder))
    run_experiment(kept_config("kd", "first", **image_folder))
    without_teacher()
    run_experiment(kept_config("kd", "second", **image_folder))
    assert_same_run(tmp_path / "second", tmp_path / "live")


def test_other_losses_students_and_rates_read_what_one_training_kept(
    kept_config, without_teacher, tmp_path
):
    run_experiment(kept_config("srrl", "first"))
    kept = parts(tmp_path / "outputs")
    assert kept == {"seed0/epoch0001": [40], "seed0/epoch0002": [40]}
    without_teacher()
    run_experiment(kept_config("kd", "losses"))  # which read less
    run_experiment(kept_config("dkd", "student", **{"STUDENT.NAME": "resnet14"}))
    run_experiment(kept_config("kd", "rates", **{"SOLVER.BASE_LR": 0.01, "SOLVER.EPOCHS": 1}))
    assert parts(tmp_path / "outputs") == kept


def test_what_a_loss_reads_beyond_what_is_kept_is_asked_and_added(
    kept_config, pair_config, tmp_path, assert_same_run, asked
):
    run_experiment(kept_config("kd", "first"))
    asked.clear()
    run_experiment(kept_config("srrl", "second"))
    assert asked == [10] * 8
    run_experiment(kept_config("srrl", "third"))
    assert asked == [10] * 8
    run_experiment(pair_config("srrl", "live"))
    assert_same_run(tmp_path / "third", tmp_path / "live")


def test_each_seed_has_outputs_of_its_own(kept_config, tmp_path, asked):
    run_experiment(kept_config("kd", "first"))
    run_experiment(kept_config("kd", "second", SEED=1))
    assert asked == [10] * 16
    assert sorted(parts(tmp_path / "outputs")) == [
        f"seed{seed}/epoch000{epoch}" for seed in (0, 1) for epoch in (1, 2)
    ]


def test_a_longer_training_asks_for_the_epochs_that_are_missing(
    kept_config, pair_config, tmp_path, assert_same_run, asked
):
    short = {"SOLVER.EPOCHS": 1, "SOLVER.SCHEDULE": "multistep", "DISTILL.WARMUP": 0}
    run_experiment(kept_config("kd", "first", **short))
    asked.clear()
    longer = {**short, "SOLVER.EPOCHS": 3}
    run_experiment(kept_config("kd", "first", **longer), resume=True)
    assert asked == [10] * 8
    run_experiment(pair_config("kd", "live", **longer))
    assert_same_run(tmp_path / "first", tmp_path / "live")


def test_a_killed_training_goes_on_bit_for_bit(
    kept_config, pair_config, tmp_path, monkeypatch, assert_same_run, asked
):
    """It is killed within the second epoch, of which two batches of four are written."""
    update = Trainer.update

    def killed(self, inputs):
        if self.epoch == 1 and len(asked) == 7:
            raise KeyboardInterrupt
        return update(self, inputs)

    # Outputs of 10 images of 10 classes, and a bit: every second batch is followed by a file.
    monkeypatch.setattr("classification.teacher_outputs.PART_BYTES", 401)
    monkeypatch.setattr(Trainer, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(kept_config("kd", "killed"))
    monkeypatch.setattr(Trainer, "update", update)
    assert parts(tmp_path / "outputs") == {"seed0/epoch0001": [20, 20], "seed0/epoch0002": [20]}
    asked.clear()
    run_experiment(kept_config("kd", "killed"), resume=True)
    assert asked == [10] * 2
    assert list(parts(tmp_path / "outputs").values()) == [[20, 20], [20, 20]]
    run_experiment(pair_config("kd", "live"))
    assert_same_run(tmp_path / "killed", tmp_path / "live")


def test_another_batch_size_asks_only_where_an_image_was_left_out(kept_config, tmp_path, asked):
    """Of 40 images batches of 9 leave out the last 4 of each epoch's order."""
    run_experiment(kept_config("kd", "first", **{"SOLVER.BATCH_SIZE": 9}))
    asked.clear()
    run_experiment(kept_config("kd", "second"))
    assert asked == [10, 10]  # the last batch of each epoch
    assert {tuple(sorted(sizes)) for sizes in parts(tmp_path / "outputs").values()} == {(4, 36)}
    run_experiment(kept_config("kd", "third", **{"SOLVER.BATCH_SIZE": 20}))
    assert asked == [10, 10]


def test_students_side_by_side_learn_from_disk_what_they_learn_alone(
    kept_config, pair_config, tmp_path, assert_same_run, without_teacher
):
    """Of two seeds, one of which has no student that asks the teacher."""
    runs = {"kd": 0, "srrl": 0, "ce": 1, "dkd": 2}
    run_side_by_side([kept_config(m, f"first/{m}", SEED=seed) for m, seed in runs.items()])
    without_teacher()
    run_side_by_side([kept_config(m, f"second/{m}", SEED=seed) for m, seed in runs.items()])
    run_experiment(kept_config("srrl", "alone"))
    assert {name.partition("/")[0] for name in parts(tmp_path / "outputs")} == {"seed0", "seed2"}
    assert_same_run(tmp_path / "second" / "srrl", tmp_path / "alone")
    for method in runs:
        assert_same_run(tmp_path / "second" / method, tmp_path / "first" / method)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DATA.FLIP", True),
        ("DATA.CROP_PADDING", 1),
        ("TEACHER.PIXEL_MEAN", "[0.1, 0.2, 0.3]"),
        ("TEACHER.NAME", "resnet14"),
        ("AUTOCAST", "bfloat16"),
        ("CHANNELS_LAST", True),
        ("COMPILE", True),
        ("DATA.TRAIN_IMAGES", 50),
    ],
)
def test_outputs_of_another_training_are_refused_by_the_key(kept_config, key, value, tmp_path):
    run_experiment(kept_config("kd", "first"))
    keys = {key: value}
    if key == "TEACHER.NAME":
        keys["TEACHER.WEIGHTS"] = tmp_path / "other.pth"
        torch.save(create_model(value, 10).state_dict(), tmp_path / "other.pth")
    else:
        keys["TEACHER.ACCURACY"] = 0
    match = rf"TEACHER\.OUTPUTS: .*outputs' was made with {key} .*, this training has .*another"
    with pytest.raises(ConfigError, match=match):
        run_experiment(kept_config("kd", "second", **keys))


def test_outputs_of_other_weights_and_on_other_images_are_refused(kept_config, tmp_path):
    run_experiment(kept_config("kd", "first"))
    torch.save(create_model("resnet8", 10).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"TEACHER\.OUTPUTS: .* made with TEACHER\.WEIGHTS"):
        run_experiment(kept_config("kd", "second", **{"TEACHER.WEIGHTS": tmp_path / "other.pth"}))
    manifest = tmp_path / "outputs" / "manifest.json"
    about = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(about | {"DATA.ROOT": "0" * 64}))
    with pytest.raises(ConfigError, match=r"TEACHER\.OUTPUTS: .* made with DATA\.ROOT"):
        run_experiment(kept_config("kd", "second"))


def test_a_batch_counts_where_images_are_mixed_with_others_of_it(kept_config):
    """Keys of a batch's mixture may be set; its images then depend on which others there are."""
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    model, data = create_model("resnet8", 2), ResidentSet(images, torch.arange(2), ("a", "b"))
    cfg = kept_config()
    assert "SOLVER.BATCH_SIZE" not in _manifest(cfg, model.state_dict(), data)
    cfg.defrost()
    cfg.DATA.MIXUP = 0.2
    assert _manifest(cfg, model.state_dict(), data)["SOLVER.BATCH_SIZE"] == 10


def test_a_folder_of_something_else_is_refused(kept_config, tmp_path):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / ".manifest.json.01234567.tmp").touch()  # that a killed run left
    run_experiment(kept_config("kd", "begun"))
    shutil.rmtree(tmp_path / "outputs")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"TEACHER\.OUTPUTS: .* is not a folder of teacher outp"):
        run_experiment(kept_config())
    (tmp_path / "outputs" / "manifest.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"TEACHER\.OUTPUTS: .* manifest.json cannot be read"):
        run_experiment(kept_config())


def test_where_nothing_can_be_kept_the_key_is_named(kept_config, tmp_path):
    (tmp_path / "outputs").touch()
    with pytest.raises(ConfigError, match=r"TEACHER\.OUTPUTS: .*outputs' is not a folder of teach"):
        run_experiment(kept_config())
    below = tmp_path / "outputs" / "below"
    with pytest.raises(ConfigError, match=r"TEACHER\.OUTPUTS: cannot write there: .*outputs"):
        run_experiment(kept_config(**{"TEACHER.OUTPUTS": below}))


def test_a_folder_from_before_a_key_was_there_has_its_default(kept_config, tmp_path, asked):
    run_experiment(kept_config("kd", "first"))
    manifest = tmp_path / "outputs" / "manifest.json"
    about = json.loads(manifest.read_text())
    del about["DATA.SPLIT_SEED"], about["TEACHER.SHARES"]
    manifest.write_text(json.dumps(about))
    asked.clear()
    run_experiment(kept_config("kd", "second"))
    assert not asked
    with pytest.raises(ConfigError, match=r"made with DATA\.SPLIT_SEED 0, this training has 1"):
        run_experiment(kept_config("kd", "third", **{"DATA.SPLIT_SEED": 1}))


def test_a_damaged_file_is_named_with_the_way_out(kept_config, tmp_path):
    run_experiment(kept_config("kd", "first"))
    file = next((tmp_path / "outputs").rglob("*.pth"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    match = rf"TEACHER\.OUTPUTS: '.*{file.name}' is damaged .*remove it to compute it again"
    with pytest.raises(ConfigError, match=match):
        run_experiment(kept_config("kd", "second"))
    file.unlink()
    run_experiment(kept_config("kd", "second"), resume=True)


def test_outputs_that_take_too_much_are_refused_with_the_loss_and_the_size(kept_config, tmp_path):
    # 40 images, 2 epochs, float32: 64 channels of 4 x 4, and 10 logits
    limit = {"TEACHER.OUTPUTS_GB": 40 * 2 * (64 * 4 * 4 + 10) * 4 / 1e9 + 1e-9}
    keys = {"DISTILL.FCKA.STAGES": "[stage3]"}
    run_experiment(kept_config("kd_fcka", "fits", **keys, **limit))
    less = {"TEACHER.OUTPUTS_GB": limit["TEACHER.OUTPUTS_GB"] - 2e-9}
    match = (
        r"GB: .* 0.000331 GB in 2 epochs, 0.000328 of them at layer3 \(64 x 4 x 4, read by FCKA\)"
    )
    with pytest.raises(ConfigError, match=match):
        run_experiment(kept_config("kd_fcka", "refused", **keys, **less))
    assert not (tmp_path / "refused" / "config.yaml").exists()


def test_what_is_read_lies_in_memory_as_what_was_kept(tmp_path):
    given = torch.randn(6, 3, 4, 5).to(memory_format=torch.channels_last)
    tokens = torch.randn(6, 21, 3)[:, 1:].transpose(1, 2).unflatten(2, (4, 5))
    outputs = Outputs(torch.randn(6, 2).bfloat16(), {"map": given, "tokens": tokens})
    taps = {"map": "layer", "tokens": "block:map"}
    kept = EpochOutputs(tmp_path, 8, taps)
    kept.keep(torch.tensor([5, 0, 3, 6, 2, 1]), outputs)

    def check(kept):
        read = kept.read(torch.tensor([0, 1, 5]))
        rows = torch.tensor([1, 5, 0])
        assert read.logits.dtype == torch.bfloat16 and read.logits.equal(outputs.logits[rows])
        for name, x in outputs.features.items():
            assert read.features[name].equal(x[rows])
            assert read.features[name].is_contiguous(memory_format=torch.channels_last)

    check(kept)
    kept.write()
    check(kept)
    again = EpochOutputs(tmp_path, 8, taps)
    check(again)
    assert again.knows(torch.tensor([6, 2])) and not again.knows(torch.tensor([6, 4]))


@pytest.mark.slow
def test_two_processes_keep_and_read_each_its_part(
    kept_config, tiny_overrides, random_teacher, start, tmp_path, assert_same_run, digits_config
):
    def train(name, **keys):
        given = {"TEACHER.WEIGHTS": random_teacher, **keys}
        words = ["--config-file", digits_config, "--method", "kd", *tiny_overrides(name, **given)]
        start(PROGRAM, *words, processes=2).succeed()
        return tmp_path / name

    live = train("live")
    outputs = {"TEACHER.OUTPUTS": tmp_path / "outputs"}
    first = train("first", **outputs)
    assert list(parts(tmp_path / "outputs").values()) == [[20, 20], [20, 20]]
    second = train("second", **outputs)
    assert_same_run(first, live)
    assert_same_run(second, live)
