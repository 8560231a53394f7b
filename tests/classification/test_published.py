from __future__ import annotations

import pytest
import yaml

from classification import compare
from classification.compare import PUBLISHED, published_accuracy
from classification.config import CONFIGS, load_config, method_files

TABLE = yaml.safe_load(PUBLISHED.read_text())
PAIRS, METHODS = list(TABLE["PAIRS"]), TABLE["METHODS"]


def config(pair="resnet110_resnet20", *overrides, method="kd"):
    return load_config(CONFIGS / "cifar100" / f"{pair}.yaml", overrides, method)


def test_the_figure_is_that_of_the_pairs_column_and_the_methods_row(monkeypatch, tmp_path):
    columns = len(PAIRS)
    table = {"kd": list(range(columns)), "at": list(range(100, 100 + columns))}
    table["ofd"] = [None] * columns
    changed = {"METHODS": table, "CONFIGS": str(CONFIGS / "cifar100")}
    text = yaml.safe_dump(TABLE | changed, sort_keys=False)
    (tmp_path / "table.yaml").write_text(text)
    monkeypatch.setattr(compare, "PUBLISHED", tmp_path / "table.yaml")
    for column, pair in enumerate(PAIRS):
        for method, figure in {"kd": column, "at": 100 + column}.items():
            assert published_accuracy(config(pair, method=method), method) == figure
        for method in ("ofd", "kd_fcka"):  # not in the paper's table
            assert published_accuracy(config(pair, method=method), method) is None
    for other in ("resnet56_resnet20", "resnet32x4_ShuffleV2"):
        assert published_accuracy(config(other), "kd") is None


def test_every_pair_has_a_configuration_and_every_method_a_file():
    assert METHODS.keys() <= method_files().keys()
    for pair in PAIRS:
        cfg = config(pair)
        assert pair == f"{cfg.TEACHER.NAME}_{cfg.STUDENT.NAME}"
    for figures in METHODS.values():
        assert len(figures) == len(PAIRS)
        assert all(figure is None or 55 < figure < 80 for figure in figures)


@pytest.mark.parametrize(
    "overrides",
    [
        ("SOLVER.EPOCHS", "239"),
        ("SOLVER.BATCH_SIZE", "128"),
        ("DATA.TRAIN_IMAGES", "40000"),
        ("DATA.HOLDOUT", "5000"),
        ("DATA.NAME", "cifar10"),
        ("STUDENT.NAME", "resnet8"),
        ("STUDENT.WEIGHTS", "x.pth"),
        ("TEACHER.NAME", ""),
        ("TEACHER.OTHERS", "[{NAME: resnet56}]"),
        ("SOLVER.BASE_LR", "0.001"),
        ("SOLVER.OPTIMIZER", "adamw"),
        ("DATA.MIXUP", "0.8"),
        ("DISTILL.KD.TEMPERATURE", "1"),
        ("DISTILL.METHODS", "[CE]"),
    ],
)
def test_another_setting_has_no_published_figure(overrides):
    assert published_accuracy(config(), "kd") == 70.67
    assert published_accuracy(config("resnet110_resnet20", *overrides), "kd") is None


def test_seed_folders_and_the_teachers_file_leave_the_setting_as_it_is():
    keys = {"SEED": 1, "OUTPUT_DIR": "out", "DATA.ROOT": "cifar", "DEVICE": "cpu", "AUTOCAST": ""}
    keys |= {"TEACHER.WEIGHTS": "t.pth", "TEACHER.ACCURACY": 0, "EVAL_EVERY": 5, "REPORT": False}
    words = [str(word) for pair in keys.items() for word in pair]
    assert published_accuracy(config("resnet110_resnet20", *words), "kd") == 70.67
