from __future__ import annotations

from fvcore.common.config import CfgNode

from pcka.engine.comparison import Comparison
from pcka.engine.report_sections import mean_curve, method_cards, run_section, table_section


def test_what_differs_from_the_defaults_is_listed():
    silent = CfgNode({"SEED": 0, "SOLVER": CfgNode({"EPOCHS": 240})})
    cfg = silent.clone()
    cfg.SOLVER.EPOCHS = 3
    cfg.EXTRA = "yes"
    environment = {
        "torch": "2.14", "pcka": None, "command_line": ["train.py", "SEED", "0"],
        "git": {"commit": "abc", "dirty": True},
    }  # fmt: skip
    section = run_section(cfg, silent, environment)
    (versions,) = section.tables
    assert versions.rows == [
        ["torch", "2.14"], ["commit", "abc with changes"], ["command", "train.py SEED 0"],
    ]  # fmt: skip
    changed, whole = section.folded.values()
    assert changed.rows == [["SOLVER.EPOCHS", "3"], ["EXTRA", "yes"]]
    assert whole == cfg.dump()


def test_a_comparisons_failures_are_told_and_its_means_are_cards():
    comparison = Comparison(["ce", "kd"], {"last": "last (%)"})
    for seed in (0, 1):
        comparison.add("ce", seed, {"last": 50.0})
        comparison.add("kd", seed, {"last": 60.0 + seed})
    comparison.failures["kd"] = {2: "not finite"}
    section = table_section(comparison)
    assert section.folded == {"Failed runs": "kd, seed 2: not finite"}
    assert section.tables[0].rows == comparison.cells()[1]
    ce, kd = method_cards(comparison)
    assert (ce.label, ce.value, ce.note) == ("ce", "50.00 ± 0.00", "last (%)")
    assert (kd.value, kd.note) == ("60.50 ± 0.71", "+10.50 ± 0.71 above")


def test_a_mean_curve_has_the_steps_that_all_have():
    assert mean_curve([[(1, 2.0), (2, 4.0)], [(1, 4.0)]]) == [(1, 3.0)]
    assert mean_curve([[], [(1, 4.0)]]) == []
