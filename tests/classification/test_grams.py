"""``pcka grams`` of a classifier's run: images sorted by class, stage by stage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from classification.config import load_config
from classification.data import load_evaluation_set, pixel_statistics
from classification.grams import sorted_sample
from classification.models import load_classifier
from classification.run import run_experiment
from pcka import cli
from pcka.engine.config import ConfigError


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_config, random_teacher):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("grams") / "run"
    keys = {
        "OUTPUT_DIR": folder, "TEACHER.NAME": "resnet8", "TEACHER.WEIGHTS": random_teacher,
        "DATA.IMAGE_SIZE": 16, "DATA.HOLDOUT": 60, "DATA.TRAIN_IMAGES": 40, "SOLVER.EPOCHS": 1,
        "SOLVER.BATCH_SIZE": 10, "DEVICE": "cpu", "REPORT": False,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("classification.run.plot_curves", lambda *_: None)
        run_experiment(load_config(digits_config, [str(w) for p in keys.items() for w in p], "ce"))
    return folder


def unit_gram(path, section, images) -> np.ndarray:
    model = load_classifier("resnet8", path, 10, role="student").eval().double()
    kept = []
    model.layer2.register_forward_hook(lambda _, __, out: kept.append(out.flatten(1).numpy()))
    with torch.no_grad():
        model(pixel_statistics(section)(images).double())
    rows = kept[0] - kept[0].mean(0)
    return rows @ rows.T / np.linalg.norm(rows @ rows.T)


def test_the_values_of_the_command_are_numpys(run, random_teacher, tmp_path):
    words = ["--taps", "stage2", "--images", "30", "--output", str(tmp_path / "sorted")]
    (pair,) = cli.main(["grams", str(run), *words]).values()
    cfg = load_config(run / "config.yaml")
    data = load_evaluation_set(cfg)
    order = np.argsort(data.labels.numpy(), kind="stable")
    chosen = order[np.linspace(0, 59, 30).astype(int)]
    (batch,) = data.subset(torch.tensor(chosen)).evaluation_batches(30)
    student = unit_gram(run / "model_last.pth", cfg.STUDENT, batch.images)
    teacher = unit_gram(random_teacher, cfg.TEACHER, batch.images)
    np.testing.assert_allclose(pair.student, student, atol=1e-5)
    np.testing.assert_allclose(pair.teacher, teacher, atol=1e-5)
    assert pair.cka == pytest.approx((student * teacher).sum(), abs=1e-5)
    with np.load(tmp_path / "sorted.npz") as values:
        assert np.array_equal(values["stage2.teacher"], pair.teacher)


def test_without_taps_all_stages_are_drawn_into_the_folder_of_the_run(run):
    pairs = cli.main(["grams", str(run)])
    assert list(pairs) == ["stage0", "stage1", "stage2", "stage3"]
    assert len(pairs["stage1"].student) == 60
    assert (run / "grams.png").stat().st_size > 20_000 and (run / "grams.npz").is_file()


def test_a_sample_is_sorted_by_class_and_counted(run):
    data = load_evaluation_set(load_config(run / "config.yaml"))
    sample, classes = sorted_sample(data, 20)
    assert sample.labels.tolist() == sorted(sample.labels.tolist()) and len(sample) == 20
    assert sum(classes.values()) == 20 and len(classes) == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--taps", "stage9"], "--taps: stage9 is not tapped; available: stage0, stage1"),
        (["--images", "2"], "--images: expected at least 3, got 2"),
        (["--patch-size", "4"], "--patch-size: is for a detector's maps"),
        (["--channel", "0"], "--channel: is for a detector's maps"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_refusals_in_one_line(run, words, message):
    with pytest.raises((ConfigError, OSError), match=message):
        cli.main(["grams", str(run), *words])


def test_a_run_without_a_teacher_is_refused(run, tmp_path):
    text = (run / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(
        text.replace("  NAME: resnet8\n  OTHERS", "  NAME: ''\n  OTHERS")
    )
    (tmp_path / "model_last.pth").touch()
    with pytest.raises(ConfigError, match=r"learned without a teacher.*TEACHER\.NAME"):
        cli.main(["grams", str(tmp_path)])
