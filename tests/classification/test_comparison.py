from __future__ import annotations

import csv

import pytest

from classification.comparison import Comparison, write_comparison
from classification.config import CONFIGS, load_config
from classification.cost import Cost
from pcka.engine.command import TrainingFailedError


def result(last, best=None, **keys):
    return {
        "last_accuracy": last,
        "best_accuracy": last if best is None else best,
        "best_epoch": 7,
        "epochs": 240,
        "teacher_accuracy": 74.311,
        "training_images": 50000,
        "evaluation_images": 10000,
        **keys,
    }


@pytest.fixture
def comparison():
    cfg = load_config(CONFIGS / "cifar100" / "resnet110_resnet20.yaml")
    made = Comparison(cfg, ["ce", "kd", "kd_fcka", "at"])
    for seed, (ce, kd, mixed) in enumerate([(69.0, 71.0, 68.0), (70.0, 71.5, 71.0), (71, 73, 70)]):
        made.add("ce", seed, result(ce, ce + 0.5))
        made.add("kd", seed, result(kd))
        made.add("kd_fcka", seed, result(mixed))
    made.add("at", 0, result(60.0))
    made.add("at", 1, TrainingFailedError("epoch 3 is not finite at step 1: loss_at=inf"))
    return made


def row(comparison, method):
    return comparison.rows()[comparison.methods.index(method)]


def test_the_table_has_means_deviations_and_paired_differences(comparison):
    assert [row["method"] for row in comparison.rows()] == ["ce", "kd", "kd_fcka", "at"]
    ce, kd, mixed = (row(comparison, method) for method in ("ce", "kd", "kd_fcka"))
    assert (ce["seeds"], ce["last epoch (%)"], ce["best epoch (%)"]) == (
        "3", "70.00 ± 1.00", "70.50 ± 1.00",
    )  # fmt: skip
    assert (ce["minus first row (%)"], ce["difference"]) == ("", "")
    # Paired: 2, 1.5, 2, so far less spread than that of the accuracies.
    assert (kd["minus first row (%)"], kd["difference"]) == ("+1.83 ± 0.29", "above")
    assert (mixed["minus first row (%)"], mixed["difference"]) == ("-0.33 ± 1.15", "none")


def test_failed_runs_are_counted_and_told(comparison):
    at = row(comparison, "at")
    assert at["seeds"] == "1 (1 failed)"
    assert at["last epoch (%)"] == "60.00"
    assert (at["minus first row (%)"], at["difference"]) == ("-9.00", "unknown (one seed)")
    text = comparison.markdown()
    assert "\n\nat, seed 1: epoch 3 is not finite at step 1: loss_at=inf\n" in text


def test_a_method_whose_runs_all_failed_has_an_empty_row(comparison):
    comparison.results.pop("at")
    at = row(comparison, "at")
    assert (at["seeds"], at["last epoch (%)"], at["difference"]) == ("0 (1 failed)", "", "")
    comparison.results.clear()
    assert "resnet20 on cifar100: ? training and ? evaluation images" in comparison.markdown()


def test_published_figures_stand_where_the_setting_is_the_papers(comparison):
    published = [row["published (%)"] for row in comparison.rows()]
    assert published == ["69.06", "70.67", "", "70.22"]
    comparison.cfg = load_config(CONFIGS / "cifar100" / "resnet56_resnet20.yaml")
    assert not any(row["published (%)"] for row in comparison.rows())
    assert "published" not in comparison.markdown()


def test_costs_stand_beside_those_of_the_first_method(comparison):
    assert "ms/image" not in comparison.markdown()
    comparison.costs = {"ce": Cost(0.5, 100.4), "kd": Cost(0.625, 150.0)}
    figures = ("step (ms/image)", "step / first row", "memory (MiB)")
    assert [row(comparison, "ce")[name] for name in figures] == ["0.500", "1.00", "100"]
    assert [row(comparison, "kd")[name] for name in figures] == ["0.625", "1.25", "150"]
    assert [row(comparison, "at")[name] for name in figures] == ["", "", ""]


def test_the_markdown_is_a_table_under_its_heading(comparison):
    heading, blank, columns, rule, *rows = comparison.markdown().splitlines()[:8]
    assert heading.startswith(
        "resnet20 from resnet110 (74.31 %) on cifar100: 50000 training and 10000 evaluation "
        "images, 240 epochs, batch 64. "
    )
    assert "95% interval" in heading and not blank
    assert columns.split(" | ")[0] == "| method"
    assert {line.count("|") for line in (columns, rule, *rows)} == {columns.count("|")}
    assert set(rule) == set("| -")
    assert rows[1].startswith("| kd | 3 | 71.83 ± 1.04 | 71.83 ± 1.04 | +1.83 ± 0.29 | above | ")


def test_the_files_are_written_whole(comparison, tmp_path):
    comparison.add("ce", 10, result(69.5, best_epoch=3, epochs=20))
    write_comparison(comparison, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"comparison.md", "comparison.csv", "comparison.png"}
    assert (tmp_path / "out" / "comparison.md").read_text() == comparison.markdown()
    with (tmp_path / "out" / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["seed"]) for line in lines] == [
        ("ce", "0"), ("ce", "1"), ("ce", "2"), ("ce", "10"),
        *(("kd", str(seed)) for seed in range(3)), *(("kd_fcka", str(seed)) for seed in range(3)),
        ("at", "0"),
    ]  # fmt: skip
    assert lines[3] == {
        "method": "ce", "seed": "10", "last_accuracy": "69.5", "best_accuracy": "69.5",
        "best_epoch": "3", "epochs": "20",
    }  # fmt: skip
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    comparison.results.clear()
    write_comparison(comparison, tmp_path / "out")  # nothing to draw yet
