from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from classification.data import ResidentSet
from classification.models import create_model
from classification.run import run_experiment
from classification.teacher import check_teacher, prepare_teacher, teacher_run
from pcka.engine.config import ConfigError
from pcka.engine.folder_lock import FolderInUseError, lock_folder


@pytest.fixture
def images():
    return ResidentSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.arange(2), ("a", "b"))


def test_a_teacher_without_weights_or_training_is_refused(tiny_config, tmp_path):
    cfg = tiny_config(**{"TEACHER.TRAIN": False})
    with pytest.raises(ConfigError, match=r"'resnet8' has no weights; .* TEACHER.TRAIN True"):
        check_teacher(cfg)
    file = tmp_path / "file.pth"
    cfg = tiny_config(**{"TEACHER.TRAIN": False, "TEACHER.WEIGHTS": file})
    with pytest.raises(ConfigError, match=r"TEACHER.WEIGHTS: there is no file '.*file.pth'"):
        check_teacher(cfg)
    file.touch()
    check_teacher(cfg)
    check_teacher(tiny_config(**{"TEACHER.TRAIN": False, "TEACHER.NAME": ""}))


def test_the_teacher_learns_by_cross_entropy_from_its_own_settings(tiny_config, images):
    cfg = tiny_config("kd", SEED=3, **{"TEACHER.SEED": 5, "TEACHER.PIXEL_MEAN": "[0.1, 0.2, 0.3]"})
    run, weights = teacher_run(cfg, images)
    assert (run.SEED, run.SOLVER.EPOCHS, run.TEACHER.NAME) == (5, 1, "")
    assert (run.DISTILL.METHODS, run.DISTILL.CE.WEIGHT) == (["CE"], 1.0)
    assert (run.STUDENT.NAME, run.STUDENT.PIXEL_MEAN) == ("resnet8", [0.1, 0.2, 0.3])
    assert str(weights) == f"{run.OUTPUT_DIR}.pth"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SEED", 9),
        ("LOG_EVERY", 9),
        ("SOLVER.EPOCHS", 9),
        ("SOLVER.EMA_DECAY", 0.9),
        ("STUDENT.PIXEL_MEAN", "[0.1, 0.1, 0.1]"),
        ("DISTILL.KD.WEIGHT", 9),
    ],
)
def test_what_concerns_the_student_alone_leaves_the_teacher_as_it_is(
    tiny_config, images, key, value
):
    assert (
        teacher_run(tiny_config("kd", **{key: value}), images)[1]
        == (teacher_run(tiny_config(), images)[1])
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TEACHER.SEED", 9),
        ("TEACHER.EPOCHS", 9),
        ("SOLVER.BASE_LR", 9),
        ("SOLVER.OPTIMIZER", "adamw"),
        ("SOLVER.DECAY_NORMS_AND_BIASES", False),
        ("SOLVER.CLIP_GRADIENTS", 1),
        ("SOLVER.ACCUMULATE", 2),
        ("SOLVER.MIN_LR", 1e-5),
        ("DATA.CROP_PADDING", 9),
    ],
)
def test_what_determines_the_teacher_makes_another_one(tiny_config, images, key, value):
    ours = teacher_run(tiny_config(), images)[1]
    assert teacher_run(tiny_config(**{key: value}), images)[1] != ours
    other = ResidentSet(images.images + 1, images.labels, images.classes)
    assert teacher_run(tiny_config(), other)[1] != ours


@pytest.mark.parametrize(("key", "value"), [("KWARGS", "{width: 2}"), ("LOGITS", "scores")])
def test_what_the_teacher_is_made_with_makes_another_one(tiny_config, images, key, value):
    run, weights = teacher_run(tiny_config(**{f"TEACHER.{key}": value}), images)
    assert weights != teacher_run(tiny_config(), images)[1]
    assert run.STUDENT[key] == ({"width": 2} if key == "KWARGS" else "scores")


@pytest.mark.parametrize(
    ("key", "value"),
    [("RANDAUGMENT", [1, 9]), ("ERASING", 0.5), ("MIXUP", 0.2), ("CUTMIX", 0.2)],
)
def test_what_the_teacher_is_trained_on_makes_another_one(tiny_config, images, key, value):
    run, weights = teacher_run(tiny_config(**{f"DATA.{key}": value}), images)
    assert weights != teacher_run(tiny_config(), images)[1]
    assert run.DATA[key] == value


def test_a_teacher_that_is_made_with_nothing_more_is_known_by_what_it_was(tiny_config, images):
    """The names of teachers that are kept already do not depend on keys that say nothing."""
    hashed = []

    def dumps(value, **_):
        hashed.extend(value[0])
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("classification.teacher.json.dumps", dumps)
        teacher_run(tiny_config(), images)
    assert "STUDENT.NAME" in hashed
    assert not {"STUDENT.KWARGS", "STUDENT.LOGITS"} & {*hashed}
    assert sorted(key for key in hashed if key.startswith("SOLVER.")) == [
        f"SOLVER.{key}"
        for key in (
            "BASE_LR", "BATCH_SIZE", "EPOCHS", "GAMMA", "MILESTONES", "MOMENTUM", "NESTEROV",
            "SCHEDULE", "WARMUP_EPOCHS", "WEIGHT_DECAY",
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kept"), [("hf/../mine/vit", "mine/vit-"), ("timm/resnet18", "timm/resnet18-")]
)
def test_a_teacher_is_kept_within_its_folder_whatever_its_name(tiny_config, images, name, kept):
    cfg = tiny_config(**{"TEACHER.NAME": name})
    weights = teacher_run(cfg, images)[1]
    assert str(weights.relative_to(cfg.TEACHER.CACHE_DIR)).startswith(kept)


def test_a_kept_teacher_that_differs_little_is_told_of(tiny_config, images, caplog):
    caplog.set_level("INFO", "pcka")
    keys = [{"SOLVER.BASE_LR": 0.2, "SOLVER.GAMMA": 0.2}, {"SOLVER.WARMUP_EPOCHS": 0.5}]
    kept = [teacher_run(tiny_config(**one), images) for one in keys]
    for run, weights in kept:
        Path(run.OUTPUT_DIR).mkdir(parents=True)
        Path(run.OUTPUT_DIR, "config.yaml").write_text(run.dump())
        save_teacher(weights)

    def train(run, _):
        save_teacher(Path(run.OUTPUT_DIR + "_last.pth"))
        Path(run.OUTPUT_DIR).mkdir()
        return Path(run.OUTPUT_DIR + "_last.pth")

    prepare_teacher(tiny_config(), (images, images), train)
    told = f"{kept[1][1]} also exists and differs in SOLVER.WARMUP_EPOCHS; set TEACHER.WEIGHTS"
    assert any(told in message for message in caplog.messages)


@pytest.fixture
def to_train(tiny_config, images):
    """``to_train(train_run)`` prepares a teacher that is to be trained; with its run's paths."""
    cfg = tiny_config("kd")
    run, weights = teacher_run(cfg, images)

    def prepare(train_run):
        return prepare_teacher(cfg, (images, images), train_run)

    prepare.folder, prepare.weights = Path(run.OUTPUT_DIR), weights
    prepare.folder.mkdir(parents=True)
    return prepare


def save_teacher(path):
    torch.save(create_model("resnet8", 2).state_dict(), path)


def test_a_teacher_that_another_run_trains_is_waited_for(to_train, monkeypatch, caplog):
    caplog.set_level("INFO", "pcka")
    other, waited = lock_folder(to_train.folder), []

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 3:  # the other run is done
            save_teacher(to_train.weights)
            os.close(other)

    monkeypatch.setattr("classification.teacher.time", SimpleNamespace(sleep=wait))
    assert to_train(train_run=None) is not None
    assert len(waited) == 3
    assert sum("another run is training it" in text for text in caplog.messages) == 1


def test_a_run_that_was_killed_while_it_trained_the_teacher_is_taken_over(to_train, monkeypatch):
    other = lock_folder(to_train.folder)
    left = to_train.weights.with_name(f".{to_train.weights.name}.01234567.tmp")
    left.touch()
    monkeypatch.setattr(
        "classification.teacher.time", SimpleNamespace(sleep=lambda _: os.close(other))
    )

    def train_run(cfg, image_sets):
        save_teacher(to_train.folder / "model_last.pth")
        return to_train.folder / "model_last.pth"

    assert to_train(train_run) is not None
    assert to_train.weights.exists() and not left.exists()


def test_of_two_runs_that_start_at_once_the_slower_one_waits(to_train, monkeypatch):
    others = []

    def train_run(cfg, image_sets):
        others.append(lock_folder(to_train.folder))
        raise FolderInUseError("another process is using")

    def wait(_):
        save_teacher(to_train.weights)
        os.close(others.pop())

    monkeypatch.setattr("classification.teacher.time", SimpleNamespace(sleep=wait))
    assert to_train(train_run) is not None


def test_a_kept_teacher_that_is_damaged_is_named_with_the_way_out(to_train):
    save_teacher(to_train.weights)
    to_train.weights.write_bytes(to_train.weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"TEACHER\.WEIGHTS: .*resnet8-.*damaged.* remove it"):
        to_train(train_run=None)


def test_a_finished_training_without_its_weights_is_named(to_train):
    with pytest.raises(ConfigError, match=r"TEACHER\.CACHE_DIR: .*model_last.pth; remove '.*'"):
        to_train(lambda *_: to_train.folder / "model_last.pth")


@pytest.fixture
def prepare(tiny_config, tmp_path):
    """``prepare(**keys)``: the teacher from a file, on 20 images; training one is a failure."""
    torch.manual_seed(0)
    model = create_model("resnet8", 10)
    model(torch.randn(8, 3, 16, 16) + 1)  # batch norms with statistics of their own
    for path in model.preactivation_norms:
        torch.nn.init.normal_(model.get_submodule(path).weight)
        torch.nn.init.normal_(model.get_submodule(path).bias)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    pixels = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8)
    data = ResidentSet(pixels, torch.arange(20) % 10, tuple("0123456789"))

    def run(tapped=(), **keys):
        cfg = tiny_config("kd", **{"TEACHER.WEIGHTS": tmp_path / "teacher.pth", **keys})
        return prepare_teacher(cfg, (data, data), train_run=None, tapped=tapped)

    run.model, run.data = model.eval(), data
    return run


def test_a_prepared_teacher_gives_the_models_logits_and_its_accuracy(prepare):
    keys = {"TEACHER.PIXEL_MEAN": "[0, 0, 0]", "TEACHER.PIXEL_STD": "[1, 1, 1]"}
    teacher = prepare(**keys)
    images = prepare.data.images / 255
    expected = prepare.model(images)
    torch.testing.assert_close(teacher.model(images), expected, rtol=1e-4, atol=1e-5)
    hits = (expected.argmax(1) == prepare.data.labels).float().mean()
    assert teacher.accuracy == pytest.approx(100 * hits.item())
    assert not teacher.model.training


def test_a_prepared_teacher_has_no_batch_norms_left_and_tells_what_they_were(prepare):
    teacher = prepare()
    modules = list(teacher.model.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in modules)
    assert teacher.norms.keys() == set(prepare.model.preactivation_norms)
    for path, norm in teacher.norms.items():
        original = prepare.model.get_submodule(path)
        torch.testing.assert_close(norm, (original.weight.data, original.bias.data))
        assert not any(tensor.requires_grad for tensor in norm)


def test_convolutions_that_taps_read_keep_their_batch_norms_apart(prepare):
    teacher = prepare(tapped=["layer2.0.conv2"])
    kept = [m for m in teacher.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert kept == [teacher.model.model.layer2[0].bn2]


def test_a_prepared_teacher_is_channels_last_where_that_is_asked_for(prepare):
    for asked in (False, True):
        teacher = prepare(CHANNELS_LAST=asked)
        weight = teacher.model.model.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == asked


def test_without_a_teacher_none_is_prepared(tiny_config, images):
    cfg = tiny_config(**{"TEACHER.NAME": "", "TEACHER.ACCURACY": 90})
    assert prepare_teacher(cfg, (images, images), train_run=None) is None


@pytest.mark.parametrize("stated", [0, 60, 72, 74])
def test_a_teacher_up_to_two_points_below_its_stated_accuracy_may_teach(
    prepare, monkeypatch, stated
):
    monkeypatch.setattr("classification.teacher.accuracy", lambda *_: {"top1": 72.0})
    assert prepare(**{"TEACHER.ACCURACY": stated}).accuracy == 72


@pytest.mark.parametrize(("top1", "told"), [(10.0, True), (72.0, False)])
def test_a_teacher_that_guesses_is_told(prepare, monkeypatch, caplog, top1, told):
    monkeypatch.setattr("classification.teacher.accuracy", lambda *_: {"top1": top1})
    with caplog.at_level("WARNING", logger="pcka"):
        prepare()
    assert ("teacher resnet8 is at chance and has nothing to teach" in caplog.text) == told


def test_a_teacher_worse_than_that_is_refused(prepare, monkeypatch):
    monkeypatch.setattr("classification.teacher.accuracy", lambda *_: {"top1": 72.0})
    expected = (
        r"TEACHER\.ACCURACY: resnet8 reaches 72\.00 % on the evaluation images, 74\.34 % is "
        r"stated; check TEACHER\.WEIGHTS, TEACHER\.PIXEL_MEAN .*\(0: any\)"
    )
    with pytest.raises(ConfigError, match=expected):
        prepare(**{"TEACHER.ACCURACY": 74.34})


def test_the_refused_teacher_stops_a_run_before_it_begins(tiny_config, random_teacher, tmp_path):
    keys = {"TEACHER.WEIGHTS": random_teacher, "TEACHER.ACCURACY": 90}
    with pytest.raises(ConfigError, match=r"TEACHER\.ACCURACY: resnet8 reaches"):
        run_experiment(tiny_config("kd", **keys))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run_experiment(tiny_config("kd", **keys | {"TEACHER.ACCURACY": 0}))
