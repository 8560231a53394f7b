"""``pcka epochs``: the students that a run keeps, and what they are like."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from classification.config import load_config
from classification.data import load_evaluation_set, pixel_statistics
from classification.models import load_classifier
from classification.run import run_experiment
from pcka import cli
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import RunFolder, kept_students


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_config, random_teacher):
    """The folder of a run of three epochs, of which every second one is kept."""
    folder = tmp_path_factory.mktemp("kept")
    keys = {
        "OUTPUT_DIR": folder / "run", "TEACHER.NAME": "resnet8", "TEACHER.WEIGHTS": random_teacher,
        "DATA.IMAGE_SIZE": 16, "DATA.HOLDOUT": 40, "DATA.TRAIN_IMAGES": 40, "SOLVER.EPOCHS": 3,
        "SOLVER.BATCH_SIZE": 10, "DEVICE": "cpu", "REPORT": False, "KEEP_EVERY": 2,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("classification.run.plot_curves", lambda *_: None)
        run_experiment(load_config(digits_config, [str(w) for p in keys.items() for w in p], "kd"))
    return folder / "run"


@pytest.fixture(scope="module")
def found(run):
    """What the command gives for it."""
    return cli.main(["epochs", str(run)])


def test_a_run_keeps_its_start_every_nth_student_and_its_last(run):
    kept = kept_students(run)
    assert list(kept) == [0, 2, 3]
    assert [path.name for path in kept.values()] == ["0000.pth", "0002.pth", "0003.pth"]
    first, _, last = (torch.load(path, weights_only=True) for path in kept.values())
    of_run = torch.load(run / "model_last.pth", weights_only=True)
    assert all(torch.equal(last[name], of_run[name]) for name in of_run)
    assert not torch.equal(first["conv1.weight"], of_run["conv1.weight"])


def unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """CKA with the unbiased HSIC of Song et al. 2012, eq. 5, of ``(N, D)``."""

    def hsic(k: np.ndarray, l: np.ndarray) -> float:
        n = len(k)
        k, l = (gram - np.diag(np.diag(gram)) for gram in (k, l))
        total = np.trace(k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (k @ l).sum()) / (n * (n - 3))

    k, l = (rows @ rows.T for rows in (x, y))
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def features_of(path: Path, section, images) -> dict[str, np.ndarray]:
    model = load_classifier("resnet8", path, 10, role="student").eval().double()
    kept = {}
    for name in ("relu", "layer1", "layer2", "layer3"):
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: kept.__setitem__(name, out.flatten(1).numpy())
        )
    with torch.no_grad():
        model(pixel_statistics(section)(images).double())
    return kept


def test_the_values_are_numpys(run, found, random_teacher):
    cfg = load_config(run / "config.yaml")
    (batch,) = load_evaluation_set(cfg).evaluation_batches(40)
    assert found.epochs == (0, 2, 3)
    assert found.layers == ("stage0", "stage1", "stage2", "stage3")
    teacher = features_of(random_teacher, cfg.TEACHER, batch.images)
    students = [features_of(p, cfg.STUDENT, batch.images) for p in kept_students(run).values()]
    for number, student in enumerate(students):
        for stage in (1, 2, 3):
            layer, others = f"layer{stage}", {"last student": students[-1], "teacher": teacher}
            for name, features in others.items():
                expected = unbiased(student[layer], features[layer])
                got = found.values[name][stage, number].item()
                assert got == pytest.approx(expected, abs=1e-4), (name, stage, number)
    assert found.values["last student"][:, -1].tolist() == pytest.approx([1] * 4, abs=1e-6)


def test_its_files_hold_the_same(run, found):
    with open(run / "epochs.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["with", "layer", "0", "2", "3"] and len(rows) == 8
    assert float(rows[5][2]) == pytest.approx(found.values["teacher"][1, 0].item(), abs=1e-6)
    assert (run / "epochs.png").stat().st_size > 10_000
    # The last row of the stages with the teacher is what the run itself followed.
    followed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    last = [followed[f"cka_stage{index}"] for index in range(4)]
    assert found.values["teacher"][:, -1].tolist() == pytest.approx(last, abs=1e-4)


def test_layers_are_compared_with_the_most_alike_stage_of_the_teacher(
    run, found, tmp_path, capsys, random_teacher
):
    name = "most alike stage of the teacher"
    words = ["--layers", "layer?", "layer1.0.conv1", "--output", str(tmp_path / "of"), "--images"]
    chosen = cli.main(["epochs", str(run), *words, "40"])
    assert chosen.layers == ("layer1", "layer2", "layer3", "layer1.0.conv1")
    own = chosen.values["last student"][:3]
    torch.testing.assert_close(own, found.values["last student"][1:], rtol=0, atol=1e-5)
    most_alike = chosen.values[name]
    assert (most_alike[:3] >= found.values["teacher"][1:] - 1e-5).all()
    assert (tmp_path / "of.png").is_file()
    # Each is named; the last layer's partner is found by hand.
    cfg = load_config(run / "config.yaml")
    (batch,) = load_evaluation_set(cfg).evaluation_batches(40)
    student = features_of(run / "model_last.pth", cfg.STUDENT, batch.images)["layer3"]
    teacher = features_of(random_teacher, cfg.TEACHER, batch.images)
    closest = max(teacher, key=lambda path: unbiased(student, teacher[path]))
    with open(tmp_path / "of.csv", newline="") as file:
        rows = [row for row in csv.reader(file) if row[0] == f"{name}: which"]
    assert [row[1] for row in rows] == list(chosen.layers)
    assert rows[2][-1] == closest
    told = f"layer3: {name} at the end: {closest}, CKA {most_alike[2, -1]:.3f}"
    assert told in capsys.readouterr().out


def test_a_teacher_whose_weights_are_gone_is_left_out_and_told(run, tmp_path, caplog, monkeypatch):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    config = moved / "config.yaml"
    text = config.read_text().replace("resnet8.pth", "gone.pth")
    config.write_text(text)
    assert list(cli.main(["epochs", str(moved)]).values) == ["last student"]
    assert any("gone.pth" in text for text in caplog.messages)


def test_too_few_epochs_are_refused_with_the_key(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("epochs"))
    with pytest.raises(ConfigError, match=r"KEEP_EVERY: .*of 0 epochs, at least 2 .*KEEP_EVERY 1"):
        cli.main(["epochs", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "x*"], r"no layer of \w+ matches 'x\*'"),
        (["--layers", "x"], "has no module 'model.x'"),
        (["--images", "3"], "at least 4 samples"),
    ],
)
def test_refusals_in_one_line(run, words, message):
    with pytest.raises(ConfigError, match=message):
        cli.main(["epochs", str(run), *words])


def test_a_resumed_run_keeps_what_the_unbroken_one_keeps(pair_config, tmp_path, without_plots):
    for name in ("whole", "broken"):
        cfg = pair_config("kd", name, **{"SOLVER.EPOCHS": 4, "KEEP_EVERY": 1, "SAVE_EVERY": 2})
        run_experiment(cfg) if name == "whole" else interrupted(cfg)
    whole, broken = (kept_students(tmp_path / name) for name in ("whole", "broken"))
    assert list(whole) == list(broken) == [0, 1, 2, 3, 4]
    for epoch, path in whole.items():
        ours, theirs = (torch.load(p, weights_only=True) for p in (path, broken[epoch]))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), epoch


def interrupted(cfg) -> None:
    """A run that is killed after its third epoch, of which there is no checkpoint, and resumed."""
    add = RunFolder.add_metrics

    def killed(files, record):
        add(files, record)
        if record["epoch"] == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "add_metrics", killed)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(cfg)
    run_experiment(cfg, resume=True)


def test_students_of_epochs_that_are_trained_anew_are_removed(tmp_path):
    (tmp_path / "epochs").mkdir()
    for name in ("0000.pth", "0002.pth", "0004.pth", "mine.pth", ".0002.pth.0123abcd.tmp"):
        (tmp_path / "epochs" / name).touch()
    with RunFolder(tmp_path, resume=True) as files:
        files.start_kept(2)
        assert list(kept_students(tmp_path)) == [0, 2]
        files.start_kept(0)
    assert [path.name for path in (tmp_path / "epochs").iterdir()] == ["mine.pth"]
