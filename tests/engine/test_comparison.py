from __future__ import annotations

import csv

import pytest

from pcka.engine.command import TrainingFailedError
from pcka.engine.comparison import Comparison, pairs_of_run
from pcka.engine.config import ConfigError
from pcka.engine.curves import method_style


def result(last, best=None, **keys):
    return {
        "last_accuracy": last,
        "best_accuracy": last if best is None else best,
        "best_epoch": 7,
        "teacher": "resnet56",
        **keys,
    }


@pytest.fixture
def comparison():
    made = Comparison(
        ["ce", "kd", "kd_fcka", "at"],
        metrics={"last_accuracy": "last epoch (%)", "best_accuracy": "best epoch (%)"},
        also_in_csv=["best_epoch"],
    )
    for seed, (ce, kd, mixed) in enumerate([(69.0, 71.0, 68.0), (70.0, 71.5, 71.0), (71, 73, 70)]):
        made.add("ce", seed, result(ce, ce + 0.5))
        made.add("kd", seed, result(kd))
        made.add("kd_fcka", seed, result(mixed))
    made.add("at", 0, result(60.0))
    made.add("at", 1, TrainingFailedError("epoch 3 is not finite at step 1: loss_at=inf"))
    return made


def row(comparison, method):
    return comparison.rows()[comparison.methods.index(method)]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_means_deviations_and_paired_differences(comparison):
    assert [row["method"] for row in comparison.rows()] == ["ce", "kd", "kd_fcka", "at"]
    ce, kd, mixed = (row(comparison, method) for method in ("ce", "kd", "kd_fcka"))
    assert (ce["seeds"], ce["last epoch (%)"], ce["best epoch (%)"]) == (
        "3", "70.00 ± 1.00", "70.50 ± 1.00",
    )  # fmt: skip
    assert (ce["minus first row"], ce["difference"]) == ("", "")
    # Paired: 2, 1.5, 2, so far less spread than that of the accuracies.
    assert (kd["minus first row"], kd["difference"]) == ("+1.83 ± 0.29", "above")
    assert (mixed["minus first row"], mixed["difference"]) == ("-0.33 ± 1.15", "not shown")


def test_failed_runs_are_counted_and_told(comparison):
    at = row(comparison, "at")
    assert at["seeds"] == "1 (1 failed)"
    assert at["last epoch (%)"] == "60.00"
    assert (at["minus first row"], at["difference"]) == ("-9.00", "unknown (one seed)")
    text = comparison.markdown()
    assert "\n\nat, seed 1: epoch 3 is not finite at step 1: loss_at=inf\n" in text


def test_a_method_whose_runs_all_failed_has_an_empty_row(comparison):
    comparison.results.pop("at")
    at = row(comparison, "at")
    assert (at["seeds"], at["last epoch (%)"], at["difference"]) == ("0 (1 failed)", "", "")


def test_further_columns_stand_behind_and_those_that_nobody_has_are_left_out(comparison):
    comparison.extra = {"published (%)": {"ce": "69.06"}, "memory (MiB)": {}}
    assert list(row(comparison, "kd"))[-2:] == ["published (%)", "memory (MiB)"]
    heading, _, first, second, *_ = comparison.markdown().splitlines()
    assert cells(heading)[-2:] == ["difference", "published (%)"]
    assert (cells(first)[-1], cells(second)[-1]) == ("69.06", "")


def test_the_markdown_is_a_table_under_its_heading(comparison):
    comparison.heading = "resnet20 from resnet56."
    heading, blank, columns, rule, *rows = comparison.markdown().splitlines()[:8]
    assert heading == "resnet20 from resnet56." and not blank
    assert cells(columns)[:3] == ["method", "seeds", "last epoch (%)"]
    assert {line.count("|") for line in (columns, rule, *rows)} == {columns.count("|")}
    assert set(rule) == set("|-")
    assert cells(rows[1]) == [
        "kd", "3", "71.83 ± 1.04", "71.83 ± 1.04", "+1.83 ± 0.29", "above",
    ]  # fmt: skip


def test_the_latex_is_a_table_of_booktabs(comparison):
    needs, begin, *lines, end, _ = comparison.latex().split("\n")
    assert needs == r"% needs \usepackage{booktabs}"
    assert (begin, end) == (r"\begin{tabular}{lrrrrr}", r"\end{tabular}")
    assert [line for line in lines if "rule" in line] == [r"\toprule", r"\midrule", r"\bottomrule"]
    heading, _, kd, mixed, _ = (
        [cell.strip() for cell in line.removesuffix(r"\\").split("&")]
        for line in lines
        if "rule" not in line
    )
    assert heading[2] == r"last epoch (\%)"
    assert kd == [
        "kd", "3", r"71.83 $\pm$ 1.04", r"71.83 $\pm$ 1.04", r"+1.83 $\pm$ 0.29", "above",
    ]  # fmt: skip
    assert mixed[0] == r"kd\_fcka" and mixed[4:] == [r"$-$0.33 $\pm$ 1.15", "not shown"]


def test_a_methods_colour_is_that_of_all_pictures(comparison):
    del comparison.results["ce"]  # all of its runs failed
    (axes,) = comparison.figure().axes
    points = [line for line in axes.get_lines() if line.get_marker() == "o"]
    colours = [method_style(index)[0] for index in (3, 2, 1)]  # from below
    assert [line.get_color() for line in points] == colours


def test_the_files_are_written_whole(comparison, tmp_path):
    comparison.add("ce", 10, result(69.5, best_epoch=3))
    comparison.write(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"comparison.{suffix}" for suffix in ("md", "csv", "tex", "png")}
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
        "best_epoch": "3",
    }  # fmt: skip
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    comparison.results.clear()
    comparison.write(tmp_path / "out")  # nothing to draw yet


def test_a_run_has_the_given_pairs_and_its_own_seed_and_folder(tmp_path):
    own = ["SEED", "3", "OUTPUT_DIR", str(tmp_path)]
    assert pairs_of_run(["SOLVER.MAX_ITER", "7"], 3, tmp_path) == ["SOLVER.MAX_ITER", "7", *own]


@pytest.mark.parametrize(("key", "option"), [("SEED", "--seeds"), ("OUTPUT_DIR", "--output")])
def test_pairs_that_set_what_each_run_has_of_its_own_are_refused(tmp_path, key, option):
    with pytest.raises(ConfigError, match=f"{key}: each run has its own; use {option} instead"):
        pairs_of_run(["SOLVER.MAX_ITER", "7", key, "5"], 3, tmp_path)
