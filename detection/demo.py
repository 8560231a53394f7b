"""From nothing to a distilled detector: ``python detection/demo.py``.

Trains a teacher on the digits scenes, then the same student by itself and from the teacher, and
writes a table of their average precision. What is finished is kept, so that a killed demo goes on
where it stopped; ``--seeds`` and ``--methods`` make a comparison of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[1]
CONFIGS = PROJECT / "configs" / "detection" / "digits"
METRICS = ("AP", "AP50", "AP75")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing and write ``table.md``."""
    parser = argparse.ArgumentParser(description="Distil a detector on scenes of digits.")
    parser.add_argument("--methods", nargs="+", default=["student", "pcka"], help="configurations")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=Path("output/detection"))
    given, overrides = parser.parse_known_args(arguments)
    teacher = _run("teacher", 0, given.output, overrides, weights=None)
    rows = {"teacher": [teacher]}
    for seed in given.seeds:
        for method in given.methods:
            weights = given.output / "teacher-0" / "model_final.pth"
            found = _run(method, seed, given.output, overrides, weights=weights)
            rows.setdefault(method, []).append(found)
            (given.output / "table.md").write_text(_table(rows))
    print(_table(rows))


def _run(
    method: str, seed: int, output: Path, overrides: Sequence[str], weights: Path | None
) -> dict[str, float]:
    """Return the box metrics of a finished run; train it where there is none."""
    folder = output / f"{method}-{seed}"
    result = folder / "result.json"
    if not result.exists():
        keys = ["SEED", str(seed), "OUTPUT_DIR", str(folder), *overrides]
        if weights is not None:
            keys += ["DISTILL.TEACHER.WEIGHTS", str(weights)]
        config = str(CONFIGS / f"{method}.yaml")
        script = str(PROJECT / "detection" / "train_net.py")
        # A process of its own for each run: detectron2's logger and registries are global.
        command = [sys.executable, "-W", "ignore", script, "--config-file", config, "--resume"]
        print(f"training {method}, seed {seed} (log: {folder / 'log.txt'})", flush=True)
        subprocess.run([*command, *keys], check=True, stdout=subprocess.DEVNULL)
    return json.loads(result.read_text())["bbox"]


def _table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean over the seeds, and the standard deviation where there are several."""
    lines = ["| | " + " | ".join(METRICS) + " | seeds |", "| --- " * (len(METRICS) + 2) + "|"]
    for method, results in rows.items():
        cells = [_spread([result[metric] for result in results]) for metric in METRICS]
        lines.append(f"| {method} | {' | '.join(cells)} | {len(results)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
