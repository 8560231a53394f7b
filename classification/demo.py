"""Compare methods on handwritten digits, in minutes: ``python classification/demo.py [OUTPUT]``."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from classification.command_line import console_log
from classification.config import load_config
from classification.experiment import run_experiment
from classification.run_files import read_metrics

CONFIGS = Path(__file__).parents[1] / "configs" / "classification" / "digits"
METHODS = {"ce": "CE", "kd": "KD", "rcka": "RCKA", "kd_fcka": "KD + FCKA"}

logger = logging.getLogger("classification")


def run_demo(output: Path, overrides: Sequence[str] = ()) -> str:
    """Train teacher and students that are not trained yet; return the table (Markdown).

    Args:
        output: a folder for each run, ``results.md`` and ``comparison.png`` go there.
        overrides: ``KEY VALUE`` pairs for all runs.
    """
    results = {}
    for file, method in METHODS.items():
        logger.info("--- %s", method)
        own = ["OUTPUT_DIR", str(output / file), "TEACHER.CACHE_DIR", str(output / "teacher")]
        cfg = load_config(CONFIGS / f"{file}.yaml", [*overrides, *own])
        results[method] = run_experiment(cfg, resume=True)
    teacher = json.loads(next((output / "teacher").glob("*/result.json")).read_text())
    table = _table(teacher, results)
    (output / "results.md").write_text(table)
    _plot({method: output / file for file, method in METHODS.items()}, output / "comparison.png")
    return table


def _table(teacher: Mapping, students: Mapping[str, Mapping]) -> str:
    """Return one row for the teacher and one for each student."""
    rows = {f"teacher ({teacher['student']})": teacher, **students}
    lines = [
        f"Digits, {teacher['training_images']} training and {teacher['evaluation_images']} "
        f"evaluation images; the students are {students['CE']['student']}.",
        "",
        "| method | accuracy, last epoch (%) | best epoch (%) | training (s) |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {run['last_accuracy']:.2f} | {run['best_accuracy']:.2f} "
        f"| {run['seconds']:.1f} |"
        for name, run in rows.items()
    ]
    return "\n".join(lines) + "\n"


def _plot(runs: Mapping[str, Path], path: Path) -> None:
    """Draw accuracy, and CKA of the last stage, of all runs by epoch."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = {"accuracy": "Top-1 accuracy (%)", "cka_stage3": "CKA with the teacher, last stage"}
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for method, folder in runs.items():
            metrics = read_metrics(folder / "metrics.jsonl")
            axes.plot([m["epoch"] for m in metrics], [m[key] for m in metrics], label=method)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the demo into the folder of the arguments; print and return the table."""
    parser = argparse.ArgumentParser(description="Compare distillation methods on digits.")
    parser.add_argument("output", nargs="?", type=Path, default=Path("output/demo"))
    with console_log():
        table = run_demo(parser.parse_args(arguments).output)
    print(table)
    return table


if __name__ == "__main__":
    main()
