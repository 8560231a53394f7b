"""Compare detectors over seeds: ``python detection/compare.py --config-files F F ...``.

Trains what is missing, each run in a process of its own, and goes on where it was killed. Runs of
one seed share the start of what they have in common and the order of the images.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode

from detection.config import PROJECT, load_config
from detection.data.register import name_coco_sets
from detection.settings import CHECKPOINT_TAG, CONFIG, RESULT, changed_settings
from pcka.checkpoint import atomic_write
from pcka.engine.command import TrainingFailedError, run_command
from pcka.engine.config import ConfigError
from pcka.engine.seeds import CONFIDENCE, mean_and_deviation, paired_differences, verdict

WEIGHTS = "model_final.pth"
METRICS = ("AP", "AP50", "AP75")
NOT_COMPARED = ("OUTPUT_DIR", "MODEL.DEVICE")

Metrics = Mapping[str, Mapping[str, float]]  # task -> COCO's metric -> percent
Results = dict[str, dict[int, Metrics]]  # run -> seed -> metrics


def compare(
    config_files: Sequence[Path],
    seeds: Sequence[int],
    output: Path,
    overrides: Sequence[str] = (),
    *,
    launcher: Sequence[str] = (sys.executable,),
) -> Results:
    """Train each configuration with each seed into ``output/<its name>/seed<seed>``.

    ``comparison.md`` and ``comparison.csv`` in ``output`` are written anew after every run.

    Args:
        config_files: what is compared; the others stand beside the first.
        seeds: of the students' start and of the order of the images.
        output: made where it is missing.
        overrides: ``KEY VALUE`` pairs for all runs.
        launcher: what starts a training, e.g. ``("torchrun", "--nproc-per-node", "8")``.

    Raises:
        ConfigError: two files of one name, or a run that was started with other settings.
    """
    files = {path.stem: path for path in config_files}
    if len(files) != len(config_files):
        raise ConfigError(
            "--config-files: expected files with names of their own, got "
            f"{', '.join(map(str, config_files))}"
        )
    results: Results = {name: {} for name in files}
    for seed in seeds:
        for name, path in files.items():
            folder = output / name / f"seed{seed}"
            results[name][seed] = train(path, seed, folder, overrides, launcher=launcher)
            _write(output / "comparison.md", markdown(results))
            _write(output / "comparison.csv", _csv(results))
    return results


def train(
    config_file: Path,
    seed: int,
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    launcher: Sequence[str] = (sys.executable,),
) -> Metrics:
    """Train into ``folder``, or go on there; return COCO's metrics. A finished run is not touched.

    Raises:
        ConfigError: a run that was started with other settings.
        TrainingFailedError: the training failed.
    """
    keys = [*overrides, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
    wanted = load_config(str(config_file), keys)
    name_coco_sets(wanted)
    if len(wanted.DATASETS.TEST) != 1:
        raise ConfigError(
            f"DATASETS.TEST: expected one set to compare on, got {wanted.DATASETS.TEST}"
        )
    result = folder / RESULT
    if result.exists() or (folder / CHECKPOINT_TAG).exists():
        _check_settings(wanted, folder)
    if not result.exists():
        print(f"training {config_file.stem}, seed {seed} (log: {folder / 'log.txt'})", flush=True)
        # A process of its own for each run: detectron2's logger and registries are global.
        script = str(PROJECT / "detection" / "train_net.py")
        command = [*launcher, script, "--resume", "--config-file", str(config_file), *keys]
        quiet = {"PYTHONWARNINGS": "ignore", **os.environ}  # release 0.6 calls deprecated names
        ended = subprocess.run(command, stdout=subprocess.DEVNULL, env=quiet, check=False)
        if ended.returncode == 130:  # Ctrl-C, which torchrun passes on to its processes alone
            raise KeyboardInterrupt
        if ended.returncode:
            raise TrainingFailedError(
                f"the training in {str(folder)!r} failed; see the error above"
            )
    return _read_result(result)


def _write(path: Path, text: str) -> None:
    atomic_write(lambda file: file.write(text.encode()), path)


def _check_settings(wanted: CfgNode, folder: Path) -> None:
    had = load_config(str(folder / CONFIG), [])
    if changed := changed_settings(had, wanted, NOT_COMPARED):
        raise ConfigError(
            f"{folder}: this run was started with other values of {', '.join(changed)}; take its "
            "own, or another folder"
        )


def _read_result(path: Path) -> Metrics:
    """The metrics of a finished run; what could not be computed is NaN.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        tasks = json.loads(path.read_text())
        return {
            task: {name: math.nan if value is None else value for name, value in found.items()}
            for task, found in tasks.items()
        }
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path}: is not what a finished run writes ({error}); remove it, and the run is "
            "evaluated again from its last checkpoint"
        ) from error


def markdown(results: Results) -> str:
    """A row for each run: means over the seeds, spread, and the difference to the first row."""
    first, tasks = next(iter(results)), _tasks(results)
    names = [_heading(task, metric) for task in tasks for metric in METRICS]
    columns = ["", *names, f"AP minus {first}", "difference", "seeds"]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for run, by_seed in results.items():
        cells = [
            mean_and_deviation([metrics[task][metric] for metrics in by_seed.values()])
            for task in tasks
            for metric in METRICS
        ]
        pairs = [] if run == first else _differences(results, run, first, tasks[0])
        compared = [mean_and_deviation(pairs, signed=True), verdict(pairs)]
        lines.append(f"| {' | '.join([run, *cells, *compared, str(len(by_seed))])} |")
    lines += [
        "",
        "Mean ± standard deviation over the seeds. A difference is named where the "
        f"{CONFIDENCE:.0%} interval of the paired differences leaves out 0 (paired t test, each "
        "row against the first, one at a time).",
    ]
    return "\n".join(lines) + "\n"


def _differences(results: Results, run: str, first: str, task: str) -> list[float]:
    own, other = (
        {seed: metrics[task]["AP"] for seed, metrics in results[name].items()}
        for name in (run, first)
    )
    return paired_differences(own, other)


def _csv(results: Results) -> str:
    """A line for each run and seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [(task, metric) for task in _tasks(results) for metric in METRICS]
    writer.writerow(["run", "seed", *(_heading(*column) for column in columns)])
    for run, by_seed in results.items():
        for seed, metrics in by_seed.items():
            writer.writerow([run, seed, *(metrics[task][metric] for task, metric in columns)])
    return text.getvalue()


def _tasks(results: Results) -> list[str]:
    """Those that every run has figures of, boxes first."""
    tasks = [
        {task for task, found in metrics.items() if set(METRICS) <= found.keys()}
        for by_seed in results.values()
        for metrics in by_seed.values()
    ]
    if not (common := set.intersection(*tasks)):
        raise ConfigError(
            f"DATASETS.TEST: no {', '.join(METRICS)} that all runs have; is the set annotated?"
        )
    return sorted(common)


def _heading(task: str, metric: str) -> str:
    return metric if task == "bbox" else f"{task} {metric}"


def main(arguments: Sequence[str] | None = None) -> Results:
    """Compare as the arguments say; print the table."""
    parser = argparse.ArgumentParser(description="Train several detectors, and compare them.")
    parser.add_argument("--config-files", nargs="+", type=Path, required=True, metavar="F")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S")
    parser.add_argument("--output", type=Path, default=Path("output/comparison"), metavar="DIR")
    parser.add_argument(
        "--launcher",
        default=shlex.quote(sys.executable),
        help="what starts a training, e.g. 'torchrun --nproc-per-node 8'",
    )
    # KEY VALUE pairs may follow the lists, which would swallow them: they come after "--".
    parser.add_argument("overrides", metavar="KEY VALUE", nargs="*")
    given = parser.parse_args(arguments)
    results = compare(
        given.config_files,
        given.seeds,
        given.output,
        given.overrides,
        launcher=shlex.split(given.launcher),
    )
    print(markdown(results))
    return results


if __name__ == "__main__":
    run_command(main, interrupted="the same command goes on where it stopped")
