"""From nothing to a distilled detector: ``python detection/demo.py``.

Trains a teacher on the digits scenes, then the same student by itself and from the teacher, and
writes a table of their average precision and a picture of their detections. What is finished is
kept, so that a killed demo goes on where it stopped; ``--seeds``, ``--methods`` and ``--steps``
make a comparison of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.modeling import META_ARCH_REGISTRY

from detection.checkpoint import load_weights
from detection.config import PROJECT, load_config
from detection.data import register_datasets
from detection.pictures import draw_detections

CONFIGS = PROJECT / "configs" / "detection" / "digits"
WEIGHTS, RESULT = "model_final.pth", "result.json"
METRICS = ("AP", "AP50", "AP75")
TEACHER_FACTOR = 2  # steps of the teacher over steps of a student
DROPS = (0.7, 0.9)  # of the steps, after which the learning rate falls to a tenth


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing and write ``table.md``."""
    parser = argparse.ArgumentParser(description="Distil a detector on scenes of digits.")
    parser.add_argument("--methods", nargs="+", default=["student", "pcka"], help="configurations")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=150, help="of a student; a teacher has twice")
    parser.add_argument("--output", type=Path, default=Path("output/detection"))
    given, overrides = parser.parse_known_args(arguments)
    teacher = _run("teacher", 0, TEACHER_FACTOR * given.steps, given.output, overrides)
    rows = {"teacher": [_metrics(teacher)]}
    for seed in given.seeds:
        folders = {"teacher": teacher}
        for method in given.methods:
            taught = ["DISTILL.TEACHER.WEIGHTS", str(teacher / WEIGHTS)]
            folder = _run(method, seed, given.steps, given.output, [*taught, *overrides])
            rows.setdefault(method, []).append(_metrics(folder))
            folders[method] = folder
            (given.output / "table.md").write_text(_table(rows))
        _picture(folders, given.output / f"detections-{seed}.png")
    print(_table(rows))


def _run(method: str, seed: int, steps: int, output: Path, overrides: Sequence[str]) -> Path:
    """Train unless the run is finished; return its folder."""
    folder = output / f"{method}-{steps}-{seed}"
    if not (folder / RESULT).exists():
        drops = str([int(part * steps) for part in DROPS])
        keys = ["SEED", str(seed), "OUTPUT_DIR", str(folder), "SOLVER.MAX_ITER", str(steps)]
        keys += ["SOLVER.STEPS", drops, *overrides]
        script = str(PROJECT / "detection" / "train_net.py")
        # A process of its own for each run: detectron2's logger and registries are global.
        command = [sys.executable, "-W", "ignore", script, "--resume"]
        print(f"training {method}, seed {seed} (log: {folder / 'log.txt'})", flush=True)
        config = ["--config-file", str(CONFIGS / f"{method}.yaml")]
        subprocess.run([*command, *config, *keys], check=True, stdout=subprocess.DEVNULL)
    return folder


def _metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / RESULT).read_text())["bbox"]


def _picture(folders: dict[str, Path], path: Path) -> None:
    """Draw what the last checkpoint of each run detects."""
    models = {}
    for method, folder in folders.items():
        cfg = load_config(str(folder / "config.yaml"), [])
        register_datasets(cfg)
        architecture = cfg.DISTILL.STUDENT or cfg.MODEL.META_ARCHITECTURE
        models[method] = META_ARCH_REGISTRY.get(architecture)(cfg)
        load_weights(models[method], str(folder / WEIGHTS))
    draw_detections(cfg, models, path)


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
