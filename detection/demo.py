"""From scratch to a distilled detector: ``python detection/demo.py``.

Trains a teacher on the digits scenes, then the same student with and without the teacher, and
writes a table of their average precision and a picture of their detections. Finished runs are kept,
so an interrupted demo continues where it stopped; ``--seeds``, ``--methods`` and ``--steps`` turn
it into a full comparison, and ``--configs`` names other detectors, or segmenters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from detection.arguments import demo_parser
from detection.checkpoint import load_weights
from detection.compare import CONFIG, WEIGHTS, compare, overall, train
from detection.config import build_student, load_config
from detection.data import register_datasets
from detection.pictures import draw_found
from detection.teacher import take_channels
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError

TEACHER_FACTOR = 2  # steps of the teacher per step of a student
DROPS = (0.7, 0.9)  # fractions of the steps after which the learning rate drops to a tenth


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the missing runs; write the comparison and the pictures, and print the comparison."""
    given, overrides = demo_parser().parse_known_args(arguments)
    output = given.output / f"steps{given.steps}"  # another number of steps is another run
    teacher = output / "teacher"
    longer = [*_schedule(TEACHER_FACTOR * given.steps), *overrides]
    files = [given.configs / f"{name}.yaml" for name in ("teacher", *given.methods)]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ConfigError(
            f"--configs: there is no {', '.join(missing)}; give a folder of teacher.yaml and "
            "the --methods"
        )
    reached = overall(train(files[0], 0, teacher, longer))
    taught = ["DISTILL.TEACHER.WEIGHTS", str(teacher / WEIGHTS)]
    comparison = compare(
        files[1:],
        given.seeds,
        output,
        [*_schedule(given.steps), *taught, *overrides],
    )
    for seed in given.seeds:
        finished = [name for name, by_seed in comparison.results.items() if seed in by_seed]
        folders = {name: output / name / f"seed{seed}" for name in finished}
        _picture({"teacher": teacher, **folders}, output / f"detections-{seed}.png")
    name, value = next(iter(reached.items()))
    print(f"teacher: {name} {value:.2f}\n\n{comparison.markdown()}")


def _schedule(steps: int) -> list[str]:
    drops = str([int(part * steps) for part in DROPS])
    return ["SOLVER.MAX_ITER", str(steps), "SOLVER.STEPS", drops]


def _picture(folders: Mapping[str, Path], path: Path) -> None:
    """Draw what each run's last checkpoint finds, on images read as the last run's."""
    configs = {name: load_config(str(folder / CONFIG), []) for name, folder in folders.items()}
    *_, read = configs.values()
    register_datasets(read, training=False)
    models = {}
    for name, cfg in configs.items():
        model = build_student(cfg)
        load_weights(model, str(folders[name] / WEIGHTS))
        models[name] = take_channels(model, cfg.INPUT.FORMAT, read.INPUT.FORMAT)
    draw_found(read, models, path)


if __name__ == "__main__":
    run_command(main, interrupted="repeat the command to continue where it stopped")
