"""Compare detectors over seeds: ``python detection/compare.py --config-files F F ...``.

Trains the missing runs, each in a separate process, and continues interrupted ones. Runs with the
same seed share the initial weights of the parts that they have in common, and the image order.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from detection.arguments import compare_parser
from detection.config import PROJECT, detection_config, load_config
from detection.data.register import name_own_sets
from detection.settings import CHECKPOINT_TAG, CONFIG, RESULT
from pcka.engine.arguments import take_pairs
from pcka.engine.command import TrainingFailedError, run_command
from pcka.engine.comparison import HOW_TO_READ, Comparison, check_output, pairs_of_run
from pcka.engine.config import ConfigError
from pcka.engine.distill import changed_settings

logger = logging.getLogger("detectron2.pcka")

WEIGHTS = "model_final.pth"
METRICS = ("AP", "AP50", "AP75")
PIXELS = "sem_seg"  # the semantic segmentation task
PIXEL_METRICS = ("mIoU", "mACC", "pACC")  # mean IoU, mean class accuracy, pixel accuracy
NOT_COMPARED = ("OUTPUT_DIR", "MODEL.DEVICE", "REPORT")

Metrics = Mapping[str, Mapping[str, float]]  # task -> metric -> percent


def compare(
    config_files: Sequence[Path],
    seeds: Sequence[int],
    output: Path,
    overrides: Sequence[str] = (),
    *,
    launcher: Sequence[str] = (sys.executable,),
) -> Comparison:
    """Train each configuration with each seed into ``output/<its name>/seed<seed>``.

    ``comparison.md``, ``.csv``, ``.tex`` and ``.png`` in ``output`` are rewritten after every run;
    with REPORT, ``report.html`` and ``.json`` are written after the last one. A failed run is
    listed there, and the others continue.

    Args:
        config_files: configurations to compare; the first is the reference for the others.
        seeds: seeds of the students' initial weights and of the image order.
        output: output folder; created if missing.
        overrides: ``KEY VALUE`` pairs for all runs, without SEED and OUTPUT_DIR.
        launcher: command that starts a training, e.g. ``("torchrun", "--nproc-per-node", "8")``.

    Raises:
        ConfigError: two files have the same name, ``output`` holds a run, a run was started with
            other settings, or the pairs set SEED or OUTPUT_DIR.
        TrainingFailedError: every run failed.
    """
    files = {path.stem: path for path in config_files}
    if len(files) != len(config_files):
        given = ", ".join(map(str, config_files))
        raise ConfigError(f"--config-files: expected files with different names, got {given}")
    check_output(output)
    comparison = empty_comparison(list(files))
    for seed in seeds:
        for name, path in files.items():
            folder = output / name / f"seed{seed}"
            try:
                add(comparison, name, seed, train(path, seed, folder, overrides, launcher=launcher))
            except TrainingFailedError as error:
                comparison.add(name, seed, error)
            comparison.write(output)
    if not comparison.results:
        reasons = [text for by_seed in comparison.failures.values() for text in by_seed.values()]
        raise TrainingFailedError("; ".join(reasons))
    if load_config(str(config_files[0]), list(overrides)).REPORT:
        _write_report(comparison, output)
    return comparison


def _write_report(comparison: Comparison, output: Path) -> None:
    from detection.comparison_report import make_comparison_report  # slow to import
    from pcka.engine.report import attempt

    folders = {
        name: {seed: output / name / f"seed{seed}" for seed in comparison.results[name]}
        for name in comparison.methods
        if name in comparison.results
    }
    make = partial(make_comparison_report, comparison, folders)
    attempt(make, output, logger, "the same command")


def empty_comparison(names: Sequence[str]) -> Comparison:
    """Return a comparison without results; it lists average precision until one is added."""
    return Comparison(
        names,
        metrics={metric: metric for metric in METRICS},
        subject="run",
        difference="AP minus first row",
        heading=f"In percent, mean ± standard deviation over seeds; {HOW_TO_READ}",
    )


def add(comparison: Comparison, name: str, seed: int, metrics: Metrics) -> None:
    """Add a finished run; the table keeps the metrics that all runs have.

    Raises:
        ConfigError: the runs have no metric in common.
    """
    found = overall(metrics)
    comparison.add(name, seed, found)
    runs = [run for by_seed in comparison.results.values() for run in by_seed.values()]
    comparison.metrics = {key: key for key in found if all(key in run for run in runs)}
    if not comparison.metrics:
        known = ", ".join((*METRICS, *PIXEL_METRICS))
        raise ConfigError(f"DATASETS.TEST: no {known} common to all runs; is the set annotated?")
    if (first := next(iter(comparison.metrics))) in PIXEL_METRICS:
        comparison.difference = f"{first} minus first row"


def overall(metrics: Metrics) -> dict[str, float]:
    """Return the metrics of a run that a comparison lists, those of boxes first."""
    found: dict[str, float] = {}
    for task, values in sorted(metrics.items()):
        names = PIXEL_METRICS if task == PIXELS else METRICS
        if values.keys() >= set(names):
            prefix = "" if task in ("bbox", PIXELS) else f"{task} "
            found |= {f"{prefix}{name}": values[name] for name in names}
    return found


def train(
    config_file: Path,
    seed: int,
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    launcher: Sequence[str] = (sys.executable,),
) -> Metrics:
    """Train into ``folder``, or resume there; return the metrics. A finished run is not touched.

    Raises:
        ConfigError: the run was started with other settings.
        TrainingFailedError: the training failed.
    """
    keys = pairs_of_run(overrides, seed, folder)
    if (metrics := finished(config_file, seed, folder, overrides)) is not None:
        return metrics
    print(f"training {config_file.stem}, seed {seed} (log: {folder / 'log.txt'})", flush=True)
    # Each run needs its own process: detectron2's logger and registries are global.
    script = str(PROJECT / "detection" / "train_net.py")
    command = [*launcher, script, "--resume", "--config-file", str(config_file), *keys]
    quiet = {"PYTHONWARNINGS": "ignore", **os.environ}  # release 0.6 calls deprecated names
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, env=quiet, check=False)
    if ended.returncode == 130:  # Ctrl-C, which torchrun passes on only to its own processes
        raise KeyboardInterrupt
    if ended.returncode:
        raise TrainingFailedError(
            f"the training in {str(folder)!r} failed; see the error it printed"
        )
    return _read_result(folder / RESULT)


def finished(
    config_file: Path, seed: int, folder: Path, overrides: Sequence[str] = ()
) -> Metrics | None:
    """Return the metrics of the run in ``folder``, or None if it is not finished.

    Raises:
        ConfigError: the run was started with other settings, or its result is damaged.
    """
    result = folder / RESULT
    started = result.exists() or (folder / CHECKPOINT_TAG).exists()
    if (changed := other_settings(config_file, seed, folder, overrides)) and started:
        raise ConfigError(
            f"{folder}: this run was started with other values of {', '.join(changed)}; use its "
            "own, or another folder"
        )
    return _read_result(result) if result.exists() else None


def other_settings(
    config_file: Path, seed: int, folder: Path, overrides: Sequence[str] = ()
) -> list[str]:
    """Return the keys in which the run in ``folder`` differs; [] if no run was started there.

    Raises:
        ConfigError: the configuration does not name exactly one set to compare on.
    """
    wanted = load_config(str(config_file), pairs_of_run(overrides, seed, folder))
    name_own_sets(wanted)
    if len(wanted.DATASETS.TEST) != 1:
        raise ConfigError(
            f"DATASETS.TEST: expected one set to compare on, got {wanted.DATASETS.TEST}"
        )
    if not any((folder / name).exists() for name in (CONFIG, RESULT, CHECKPOINT_TAG)):
        return []
    changed = changed_settings(load_config(str(folder / CONFIG), []), wanted)
    return [key for key in changed if key not in NOT_COMPARED]


def _read_result(path: Path) -> Metrics:
    """Read the metrics of a finished run; those that could not be computed are NaN.

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
            f"{path}: is not the result of a finished run ({error}); remove it to evaluate the run "
            "again from its last checkpoint"
        ) from error


def main(arguments: Sequence[str] | None = None) -> Comparison:
    """Run the comparison given by the arguments; print the table."""
    words, pairs = take_pairs(sys.argv[1:] if arguments is None else arguments, detection_config())
    given = compare_parser().parse_intermixed_args(words)
    comparison = compare(
        given.config_files,
        given.seeds,
        given.output,
        [*pairs, *given.overrides],
        launcher=shlex.split(given.launcher),
    )
    print(comparison.markdown())
    return comparison


if __name__ == "__main__":
    run_command(main, interrupted="repeat the command to continue where it stopped")
