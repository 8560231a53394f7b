from __future__ import annotations

import csv
from pathlib import Path

import pytest

from classification import compare as script
from classification.compare import (
    METRICS,
    Variant,
    _groups,
    compare,
    cost_columns,
    heading,
    new_comparison,
    read_variants,
)
from classification.config import CONFIGS, load_config
from classification.sweep import run_side_by_side
from pcka.engine.comparison import Comparison
from pcka.engine.config import ConfigError
from pcka.engine.cost import Cost
from pcka.engine.run_folder import RunFolder, read_metrics

pytestmark = pytest.mark.usefixtures("without_plots")
METHODS, SEEDS = ("kd", "fitnet"), (0, 1)
KD = [f"kd/seed{seed}" for seed in SEEDS]
RUNS = [f"{method}/seed{seed}" for seed in SEEDS for method in METHODS]


@pytest.fixture
def comparing(digits_config, tiny_overrides, random_teacher, tmp_path):
    """``comparing(name, **changes)``: the comparison of two methods over two seeds, in a folder."""
    overrides = tiny_overrides("", **{"TEACHER.WEIGHTS": random_teacher})

    def run(name: str, methods=METHODS, seeds=SEEDS, **keywords):
        keywords = {"costs": False, **keywords}
        return compare(digits_config, methods, seeds, tmp_path / name, overrides, **keywords)

    return run


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_each_method_is_trained_with_each_seed_side_by_side(comparing, tmp_path):
    comparison = comparing("out")
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, str(seed)) for method in METHODS for seed in SEEDS
    ]
    for row in rows:
        folder = tmp_path / "out" / row["method"] / f"seed{row['seed']}"
        first, last = read_metrics(folder / "metrics.jsonl")
        assert float(row["last_accuracy"]) == last["accuracy"]
        assert first["students"] == last["students"] == 2
        assert any(key.startswith(f"loss_{row['method']}") for key in first)
        text = (folder / "config.yaml").read_text()
        assert f"SEED: {row['seed']}\n" in text and f"OUTPUT_DIR: {folder}\n" in text
    totals = [read_metrics(tmp_path / "out" / run / "metrics.jsonl")[0]["loss_kd"] for run in KD]
    assert totals[0] != totals[1]  # students of two seeds learn different things
    assert comparison.markdown() == (tmp_path / "out" / "comparison.md").read_text()


def test_so_many_are_trained_together_and_no_more(comparing, monkeypatch, tmp_path):
    groups = []

    def recorded(cfgs, **keywords):
        groups.append([str(Path(cfg.OUTPUT_DIR).relative_to(tmp_path / "out")) for cfg in cfgs])
        return run_side_by_side(cfgs, **keywords)

    monkeypatch.setattr(script, "run_side_by_side", recorded)
    comparing("out", methods=("ce", "kd", "at"), seeds=(3,), together=2)
    assert groups == [["ce/seed3", "kd/seed3"], ["at/seed3"]]


def test_a_stopped_comparison_goes_on_where_it_stopped(
    comparing, tmp_path, monkeypatch, assert_same_run
):
    comparing("whole")
    save_state, calls = RunFolder.save_state, []

    def stop_in_the_last_epoch(self, state):
        calls.append(self)
        if len(calls) == 8:  # two seeds, two epochs, two methods: the very last one
            raise KeyboardInterrupt
        save_state(self, state)

    monkeypatch.setattr(RunFolder, "save_state", stop_in_the_last_epoch)
    with pytest.raises(KeyboardInterrupt):
        comparing("out")
    monkeypatch.undo()
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert "|kd|1|" in table.replace(" ", "")
    assert not (tmp_path / "out" / "fitnet" / "seed1" / "result.json").exists()
    finished = [tmp_path / "out" / method / "seed0" for method in METHODS]
    before = [times(folder) for folder in finished]
    trained = (tmp_path / "out" / "kd" / "seed1" / "checkpoint.pth").stat().st_mtime_ns
    comparing("out")
    assert [times(folder) for folder in finished] == before
    assert (tmp_path / "out" / "kd" / "seed1" / "checkpoint.pth").stat().st_mtime_ns == trained
    for run in RUNS:
        assert_same_run(tmp_path / "out" / run, tmp_path / "whole" / run)
    for name in ("comparison.md", "comparison.csv"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_variants_are_methods_with_settings_of_their_own(comparing, tmp_path):
    path = tmp_path / "variants.yaml"
    path.write_text(
        "kd:\n"
        "hot: {METHOD: kd, DISTILL.KD.TEMPERATURE: 8.0}\n"
        "two:\n  METHOD: kd\n  DISTILL.METHODS: [CE, KD, FCKA]\n  DISTILL.FCKA.STAGES: [last]\n"
    )
    variants = read_variants(path)
    comparing("out", methods=list(variants), seeds=(0,), variants=variants)
    configured = {
        name: load_config(tmp_path / "out" / name / "seed0" / "config.yaml") for name in variants
    }
    assert {name: cfg.DISTILL.KD.TEMPERATURE for name, cfg in configured.items()} == {
        "kd": 4.0, "hot": 8.0, "two": 4.0
    }  # fmt: skip
    assert configured["two"].DISTILL.METHODS == ["CE", "KD", "FCKA"]
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert [row["method"] for row in rows] == ["kd", "hot", "two"]
    (first, *_) = read_metrics(tmp_path / "out" / "two" / "seed0" / "metrics.jsonl")
    assert "loss_fcka_last" in first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kd: 8.0", r"variants.yaml: kd: expected keys and values, got 8.0"),
        ("- kd", r"variants.yaml: expected a mapping"),
        ("hot: {DISTILL.KD.TEMPERATURE: 8.0}", r"unknown method 'hot'"),
        ("kd: {DISTILL.KD.TEMPERATUR: 8.0}", r"DISTILL.KD.TEMPERATUR.*TEMPERATURE"),
        ("kd: {SEED: 1}", "SEED: each run has its own; use --seeds instead"),
        ("kd: {OUTPUT_DIR: out}", "OUTPUT_DIR: each run has its own; use --output instead"),
        ("{kd: , slow: {METHOD: kd, SOLVER.BASE_LR: 0.01}}", r"SOLVER.BASE_LR: runs side by side"),
    ],
)
def test_variants_that_cannot_be_are_refused(comparing, tmp_path, text, message):
    path = tmp_path / "variants.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        variants = read_variants(path)
        comparing("out", methods=list(variants), seeds=(0,), variants=variants)


def test_only_what_is_missing_is_trained(comparing, tmp_path):
    (tmp_path / "out").mkdir()
    left = tmp_path / "out" / ".comparison.md.01234567.tmp"  # by a kill
    left.touch()
    comparing("out", seeds=(0,))
    assert not left.exists()
    before = times(tmp_path / "out" / "kd") | times(tmp_path / "out" / "fitnet")
    comparison = comparing("out", methods=("fitnet", "ce", "kd"), seeds=(1, 0))
    after = times(tmp_path / "out")
    assert {path: after[path] for path in before} == before
    assert [row["seeds"] for row in comparison.rows()] == ["2", "2", "2"]
    assert [row["method"] for row in comparison.rows()] == ["fitnet", "ce", "kd"]


def test_a_method_that_fails_is_told_and_the_others_are_compared(comparing, tmp_path, caplog):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "wild.yaml").write_text("DISTILL: {METHODS: [KD], KD: {WEIGHT: 1e39}}")
    config = tmp_path / "config.yaml"
    base = Path(script.__file__).parents[1] / "configs/classification/digits/resnet20_resnet8.yaml"
    config.write_text(f"_BASE_: {base}\n")
    overrides = ["TEACHER.NAME", "resnet8", "TEACHER.EPOCHS", "1", "SOLVER.EPOCHS", "1"]
    overrides += ["DATA.TRAIN_IMAGES", "40", "DATA.HOLDOUT", "40", "DATA.IMAGE_SIZE", "16"]
    overrides += ["TEACHER.CACHE_DIR", str(tmp_path / "teachers")]
    comparison = compare(config, ("wild", "ce"), (0,), tmp_path / "out", overrides, costs=False)
    assert "wild, seed 0: failed: epoch 1 is not finite at step 1: loss_kd=inf" in caplog.text
    assert [row["seeds"] for row in comparison.rows()] == ["0 (1 failed)", "1"]
    assert "wild, seed 0: epoch 1 is not finite" in (tmp_path / "out/comparison.md").read_text()


def test_costs_are_measured_once_and_kept(comparing, tmp_path, monkeypatch):
    assert "step (ms/image)" not in comparing("out", seeds=(0,)).extra
    assert not (tmp_path / "out" / "costs.json").exists()
    costs = comparing("out", seeds=(0,), costs=True).extra
    assert list(costs["step (ms/image)"]) == list(METHODS)
    assert "step (ms/image)" in (tmp_path / "out" / "comparison.md").read_text()
    monkeypatch.setattr(script, "prepare_trainers", None)  # is not called again
    assert comparing("out", seeds=(0,), costs=True).extra == costs


@pytest.mark.parametrize(
    ("methods", "seeds"), [(("kd", "ce", "kd"), (0,)), (("kd", "ce"), (0, 1, 0))]
)
def test_what_is_named_twice_is_refused(comparing, methods, seeds):
    with pytest.raises(ConfigError, match="methods and seeds: expected each one once"):
        comparing("out", methods, seeds)


@pytest.mark.parametrize(("key", "option"), [("SEED", "--seeds"), ("OUTPUT_DIR", "--output")])
def test_the_command_line_may_not_set_the_seed_or_the_folder(
    digits_config, monkeypatch, key, option
):
    monkeypatch.setattr(script, "run_side_by_side", None)  # is not called
    words = ["--config-file", str(digits_config), "--methods", "ce"]
    with pytest.raises(ConfigError, match=f"{key}: each run has its own; use {option} instead"):
        script.main([*words, key, "5"])


def test_the_folder_of_a_run_is_refused(comparing, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"--output: .*run holds a run; give a comparison anoth"):
        comparing("run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_an_unknown_method_is_refused_before_anything_is_trained(comparing, tmp_path):
    with pytest.raises(ConfigError, match="unknown method 'kf'"):
        comparing("out", ("ce", "kf"), together=1)
    assert not (tmp_path / "out").exists()


def test_variants_of_a_file_are_compared_in_its_order(monkeypatch, tmp_path):
    path, seen = tmp_path / "variants.yaml", []

    def recorded(config_file, methods, *_, variants, **keywords):
        seen.append((methods, variants))
        return Comparison(methods, METRICS, results={"hot": {0: {}}})

    monkeypatch.setattr(script, "compare", recorded)
    monkeypatch.setattr(Comparison, "markdown", lambda self: "the table")
    path.write_text("hot: {METHOD: kd, DISTILL.KD.TEMPERATURE: 8.0}\nce:\n")
    script.main(["--config-file", "F", "--variants", str(path)])
    hot = Variant("kd", ("DISTILL.KD.TEMPERATURE", "8.0"))
    assert seen == [(["hot", "ce"], {"hot": hot, "ce": Variant("ce")})]
    with pytest.raises(SystemExit):
        script.main(["--config-file", "F", "--variants", str(path), "--methods", "kd"])


def test_the_command_line_is_passed_on(monkeypatch, capsys, tmp_path):
    seen = []

    class Table:
        results = ("some",)

        def markdown(self):
            return "the table"

    def recorded(*arguments, **keywords):
        seen.append((arguments, keywords))
        return Table()

    monkeypatch.setattr(script, "compare", recorded)
    words = ["--config-file", "F", "--methods", "kd", "ce"]
    script.main(words)
    for name in ("report.html", "comparison.tex", "costs.json"):
        (tmp_path / name).touch()
    (tmp_path / "kd1.5").mkdir()
    others = ["--seeds", "4", "5", "--output", str(tmp_path), "--together", "3", "--no-costs"]
    script.main([*words, *others, "--", "SOLVER.EPOCHS", "3"])
    assert seen == [
        (
            (Path("F"), ["kd", "ce"], [0, 1, 2], Path("output/comparison"), []),
            {"variants": {}, "together": 8, "costs": True},
        ),
        (
            (Path("F"), ["kd", "ce"], [4, 5], tmp_path, ["SOLVER.EPOCHS", "3"]),
            {"variants": {}, "together": 3, "costs": False},
        ),
    ]
    told = capsys.readouterr().out
    assert told.count("the table\n") == told.count(", and a folder for each run\n") == 2
    assert f"{tmp_path}: comparison.tex, costs.json, report.html, and a folder" in told
    with pytest.raises(SystemExit):
        script.main([*words, "--together", "0"])
    assert "expected at least 1, got 0" in capsys.readouterr().err


def test_on_a_gpu_seeds_are_trained_side_by_side_too():
    runs = [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert _groups("ab", [0, 1], 3, seeds_too=True) == [runs[:3], runs[3:]]
    assert _groups("ab", [0, 1], 3, seeds_too=False) == [runs[:2], runs[2:]]
    assert _groups("ab", [0, 1], 1, seeds_too=False) == [[run] for run in runs]


@pytest.fixture
def of_the_paper():
    return load_config(CONFIGS / "cifar100" / "resnet110_resnet20.yaml")


def result(last):
    return {
        "last_accuracy": last, "best_accuracy": last, "best_epoch": 7, "epochs": 240,
        "teacher_accuracy": 74.311, "training_images": 50000, "evaluation_images": 10000,
    }  # fmt: skip


def test_published_figures_stand_beside_the_methods_whose_setting_is_the_papers():
    pair, methods = CONFIGS / "cifar100" / "resnet110_resnet20.yaml", ["ce", "kd", "kd_fcka", "at"]

    def published(*words):
        cfgs = {method: load_config(pair, words, method) for method in methods}
        return [row["published (%)"] for row in new_comparison(cfgs).rows()]

    assert published() == ["69.06", "70.67", "", "70.22"]
    assert published("DISTILL.KD.TEMPERATURE", "1") == ["69.06", "", "", "70.22"]
    tuned = new_comparison({"kd": load_config(pair, ["SOLVER.ACCUMULATE", "2"], "kd")})
    assert "published" not in tuned.markdown()


def test_the_heading_says_what_was_compared(of_the_paper):
    comparison = new_comparison(dict.fromkeys(("ce", "kd"), of_the_paper))
    expected = "resnet20 on cifar100: ? training and ? evaluation images, 240 epochs, batch 64. "
    assert heading(of_the_paper, comparison).startswith(expected)
    comparison.add("ce", 0, result(69.0))
    text = heading(of_the_paper, comparison)
    assert text.startswith(
        "resnet20 from resnet110 (74.31 %) on cifar100: 50000 training and 10000 evaluation "
        "images, 240 epochs, batch 64. "
    )
    assert "95% interval" in text


def test_batches_that_make_an_update_together_stand_in_the_heading():
    pair = CONFIGS / "cifar100" / "resnet110_resnet20.yaml"
    cfg = load_config(pair, ["SOLVER.ACCUMULATE", "2"])
    assert "240 epochs, batch 64 x 2. " in heading(cfg, new_comparison({"ce": cfg}))


def test_the_averaged_students_have_a_column_where_there_are_any(of_the_paper):
    pair = CONFIGS / "cifar100" / "resnet110_resnet20.yaml"
    comparison = new_comparison({"ce": load_config(pair, ["SOLVER.EMA_DECAY", "0.99"])})
    comparison.add("ce", 0, {**result(69.0), "last_accuracy_ema": 70.25})
    assert comparison.rows()[0]["averaged student (%)"] == "70.25"
    assert "averaged" not in new_comparison({"ce": of_the_paper}).markdown()


def test_costs_stand_beside_those_of_the_first_method():
    columns = cost_columns({"ce": Cost(0.5, 100.4), "kd": Cost(0.625, 150.0)})
    assert columns == {
        "step (ms/image)": {"ce": "0.500", "kd": "0.625"},
        "step / first row": {"ce": "1.00", "kd": "1.25"},
        "memory (MiB)": {"ce": "100", "kd": "150"},
    }
