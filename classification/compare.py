"""Compare methods over seeds: ``python classification/compare.py --config-file F --methods M ...``.

Trains missing runs and resumes interrupted ones. For each seed, all methods are trained side by
side, with the same initial weights, image order and augmentation, and one teacher that runs once
for all of them. On a GPU, which one small student leaves idle, the seeds are trained side by side
as well.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import yaml
from fvcore.common.config import CfgNode

from classification.arguments import compare_parser
from classification.config import (
    CONFIGS,
    HARMLESS_KEYS,
    default_config,
    load_config,
    teacher_name,
)
from classification.data import Batch
from classification.lessons import Lessons, StepInputs
from classification.pair import pair_settings
from classification.run import prepare_trainers
from classification.sweep import run_side_by_side
from classification.teacher import ImageSets
from classification.trainer import Trainer
from pcka.distributed import rank
from pcka.engine.arguments import take_pairs
from pcka.engine.command import TrainingFailedError, run_command
from pcka.engine.comparison import HOW_TO_READ, Comparison, check_output, pairs_of_run
from pcka.engine.config import ConfigError, read_tree
from pcka.engine.cost import (
    ROUNDS,
    Cost,
    kept_costs,
    median_seconds,
    peak_mebibytes,
    settings_digest,
)
from pcka.engine.curves import plot_gradients
from pcka.engine.distill import changed_settings
from pcka.engine.launch import is_first, process_group
from pcka.engine.progress import console_log
from pcka.engine.run_folder import read_metrics, remove_temporaries

if TYPE_CHECKING:  # keeps --help fast
    import torch

logger = logging.getLogger("pcka")

PUBLISHED = CONFIGS.parent / "reproduce" / "table1.yaml"
# Keys that may differ from the paper's setting: they leave the recipe as it is.
NEUTRAL_KEYS = {
    *HARMLESS_KEYS,
    *("SEED", "IMPORTS", "DEVICE", "CHANNELS_LAST", "AUTOCAST", "COMPILE", "EVAL_EVERY"),
    *("TEACHER.WEIGHTS", "TEACHER.TRAIN", "TEACHER.SEED"),
}
METRICS = {"last_accuracy": "last epoch (%)", "best_accuracy": "best epoch (%)"}
AVERAGED = {"last_accuracy_ema": "averaged student (%)"}


class Variant(NamedTuple):
    """A method with its own settings.

    Attributes:
        method: name of a method file.
        overrides: ``KEY VALUE`` pairs.
    """

    method: str
    overrides: tuple[str, ...] = ()


def read_variants(path: str | Path) -> dict[str, Variant]:
    """Return the variants of a YAML file by name, in file order.

    Each one maps keys to values; ``METHOD`` names the method file if its name differs from the
    variant's::

        kd:
        kd_fcka10: {METHOD: kd_fcka, DISTILL.FCKA.WEIGHTS: 10.0}

    Raises:
        ConfigError: as :func:`pcka.engine.config.read_tree`, or an entry that is no such mapping.
    """
    variants = {}
    for name, settings in read_tree(Path(path)).items():
        if not isinstance(settings, Mapping | None):
            raise ConfigError(f"{path}: {name}: expected keys and values, got {settings!r}")
        keys = dict(settings or {})
        method = str(keys.pop("METHOD", name))
        variants[str(name)] = Variant(
            method, tuple(str(word) for pair in keys.items() for word in pair)
        )
    return variants


def compare(
    config_file: Path | Mapping[str, object],
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    overrides: Sequence[str] = (),
    *,
    variants: Mapping[str, Variant] = MappingProxyType({}),
    together: int = 8,
    costs: bool = True,
) -> Comparison:
    """Train each method with each seed into ``output/<method>/seed<seed>``, and compare them.

    Args:
        config_file: file of data, student and teacher, or their settings by dotted keys.
        methods: names of method files or variants; the others are compared with the first.
        seeds: of the students' initial weights, image order and augmentation.
        output: also receives ``comparison.md``, ``.csv``, ``.tex`` and ``.png``; with REPORT
            ``report.html`` and ``.json``; with GRADIENTS_EVERY ``gradients.png`` of the first seed.
        overrides: ``KEY VALUE`` pairs for all runs, without SEED and OUTPUT_DIR.
        variants: by name; all other methods are method files.
        together: maximum number of students side by side; they share the device's memory.
        costs: measure the cost of a step of each method once the runs are done.

    Raises:
        ConfigError: a method or seed named twice, an ``output`` that holds a run, pairs that set
            SEED or OUTPUT_DIR, or as :func:`run_side_by_side`.
    """
    if len(set(methods)) != len(methods) or len(set(seeds)) != len(seeds):
        raise ConfigError(f"methods and seeds: expected each one once, got {methods} and {seeds}")
    check_output(output)

    def configure(method: str, seed: int) -> CfgNode:
        variant = variants.get(method, Variant(method))
        given, folder = [*variant.overrides, *overrides], output / method / f"seed{seed}"
        return load_config(config_file, pairs_of_run(given, seed, folder), variant.method)

    # Configure all runs before training the first, so that a wrong name fails at once.
    cfgs = {(method, seed): configure(method, seed) for method in methods for seed in seeds}
    by_method = {method: cfgs[method, seeds[0]] for method in methods}
    first, comparison = by_method[methods[0]], new_comparison(by_method)
    with process_group(first.DEVICE) as device:
        if rank() == 0:
            remove_temporaries(output)
        for group in _groups(methods, seeds, together, seeds_too=device.type == "cuda"):
            results = run_side_by_side([cfgs[run] for run in group], resume=True)
            for (method, seed), result in zip(group, results, strict=True):
                if isinstance(result, TrainingFailedError):
                    logger.warning("%s, seed %d: failed: %s", method, seed, result)
                comparison.add(method, seed, result)
            comparison.heading = heading(first, comparison)
            comparison.write(output)
        if rank() == 0:
            folders = {method: output / method / f"seed{seeds[0]}" for method in methods}
            of_runs = {m: read_metrics(f / "metrics.jsonl") for m, f in folders.items()}
            plot_gradients(of_runs, output / "gradients.png")
        if costs:
            columns = cost_columns(measure_costs(by_method, output / "costs.json"))
            comparison.extra = {**comparison.extra, **columns}
            comparison.write(output)
        if first.REPORT and comparison.results and rank() == 0:
            _write_report(comparison, output)
    return comparison


def _write_report(comparison: Comparison, output: Path) -> None:
    from classification.comparison_report import make_comparison_report  # heavy imports
    from pcka.engine.report import attempt

    folders = {
        method: {seed: output / method / f"seed{seed}" for seed in comparison.results[method]}
        for method in comparison.methods
        if method in comparison.results
    }
    make = partial(make_comparison_report, comparison, folders)
    attempt(make, output, logger, "the same command")


def _groups(
    methods: Sequence[str], seeds: Sequence[int], size: int, *, seeds_too: bool
) -> list[list[tuple[str, int]]]:
    """Group the runs (method, seed) to train side by side: of one seed, or of several."""
    by_seed = [[(method, seed) for method in methods] for seed in seeds]
    rows = [[run for row in by_seed for run in row]] if seeds_too else by_seed
    return [row[start : start + size] for row in rows for start in range(0, len(row), size)]


def new_comparison(cfgs: Mapping[str, CfgNode]) -> Comparison:
    """Return a comparison without results, with the paper's figures where the setting is its own.

    Args:
        cfgs: method -> configuration of one of its runs.
    """
    accuracies = {method: published_accuracy(cfg, method) for method, cfg in cfgs.items()}
    published = {method: value for method, value in accuracies.items() if value is not None}
    averaged = all(cfg.SOLVER.EMA_DECAY for cfg in cfgs.values())
    return Comparison(
        list(cfgs),
        METRICS | (AVERAGED if averaged else {}),
        difference="minus first row (%)",
        also_in_csv=("best_epoch", "epochs"),
        extra={"published (%)": {method: f"{value:.2f}" for method, value in published.items()}},
    )


def heading(cfg: CfgNode, comparison: Comparison) -> str:
    """Describe what was compared, from one run's configuration and the results so far."""
    some = next((r for by_seed in comparison.results.values() for r in by_seed.values()), {})
    teacher = some.get("teacher_accuracy")
    taught = f" from {teacher_name(cfg)} ({teacher:.2f} %)" if teacher is not None else ""
    batch = f"{cfg.SOLVER.BATCH_SIZE}" + f" x {cfg.SOLVER.ACCUMULATE}" * (cfg.SOLVER.ACCUMULATE > 1)
    return (
        f"{cfg.STUDENT.NAME}{taught} on {cfg.DATA.NAME}: {some.get('training_images', '?')} "
        f"training and {some.get('evaluation_images', '?')} evaluation images, "
        f"{cfg.SOLVER.EPOCHS} epochs, batch {batch}. Top-1 accuracy, mean ± "
        f"standard deviation over seeds; {HOW_TO_READ}"
    )


def published_accuracy(cfg: CfgNode, method: str) -> float | None:
    """Return the paper's top-1 accuracy (%) of a method, or None if there is none.

    Args:
        cfg: of a run; its setting is the paper's if it differs from the file of its pair in
            :data:`PUBLISHED` in :data:`NEUTRAL_KEYS` only.
        method: name of a method file.
    """
    table = yaml.safe_load(PUBLISHED.read_text())
    pair, files = f"{cfg.TEACHER.NAME}_{cfg.STUDENT.NAME}", table["PAIRS"]
    if pair not in files or method not in table["METHODS"]:
        return None
    papers = load_config(PUBLISHED.parent / table["CONFIGS"] / files[pair], method=method)
    if changed_settings(papers, cfg).keys() - NEUTRAL_KEYS:
        return None
    return table["METHODS"][method][list(files).index(pair)]


def cost_columns(costs: Mapping[str, Cost]) -> dict[str, dict[str, str]]:
    """Columns of the table: heading -> method -> cell."""
    first = next(iter(costs.values()))
    return {
        "step (ms/image)": {m: f"{cost.milliseconds:.3f}" for m, cost in costs.items()},
        "step / first row": {
            m: f"{cost.milliseconds / first.milliseconds:.2f}" for m, cost in costs.items()
        },
        "memory (MiB)": {m: f"{cost.mebibytes:.0f}" for m, cost in costs.items()},
    }


def measure_costs(
    cfgs: Mapping[str, CfgNode],
    path: Path,
    *,
    rounds: int = ROUNDS,
    image_sets: ImageSets | None = None,
) -> dict[str, Cost]:
    """Measure the cost of a step of each method; in each round, all methods share one batch.

    A step is one batch and one update, regardless of SOLVER.ACCUMULATE.

    Args:
        cfgs: method -> configuration; they differ in ``DISTILL`` and ``OUTPUT_DIR`` only.
        path: file that stores the costs, see :func:`pcka.engine.cost.kept_costs`.
        rounds: timed steps per method.
        image_sets: training and evaluation images, if already in memory.
    """
    lead = next(iter(cfgs.values()))
    with process_group(lead.DEVICE) as device:

        def measure() -> dict[str, Cost]:
            made = prepare_trainers(list(map(_updating, cfgs.values())), device, image_sets)
            return _measure(dict(zip(cfgs, made, strict=True)), rounds)

        settings = {method: _settings(cfg, device) for method, cfg in cfgs.items()}
        return kept_costs(path, settings, measure)


def _updating(cfg: CfgNode) -> CfgNode:
    """The configuration with an update after each batch."""
    same = cfg.clone()
    same.defrost()
    same.SOLVER.ACCUMULATE = 1
    return same


def _settings(cfg: CfgNode, device: torch.device) -> str:
    """Return a digest of what a step's cost depends on: machine and settings without folders."""
    same = cfg.clone()
    same.defrost()
    same.OUTPUT_DIR = same.DATA.ROOT = same.TEACHER.OUTPUTS = ""
    return settings_digest(same.dump(), device)


def _measure(trainers: Mapping[str, Trainer], rounds: int) -> dict[str, Cost]:
    lead = next(iter(trainers.values()))
    batches, images = _endless(lead), lead.cfg.SOLVER.BATCH_SIZE
    lessons = {method: _lessons(t, t.obstacle) for method, t in trainers.items()}

    def one_round() -> Iterator[dict[str, partial[None]]]:
        while True:
            batch = next(batches)
            yield {
                method: partial(_step, partial(trainer.step, step=0), lessons[method], batch)
                for method, trainer in trainers.items()
            }

    seconds = median_seconds(one_round(), rounds, lead.device)
    costs, batch = {}, next(batches)
    for method, trainer in trainers.items():
        # A replay allocates no memory.
        step = partial(_step, trainer.update, _lessons(trainer, ""), batch)
        costs[method] = Cost(1000 * seconds[method] / images, peak_mebibytes(step, lead.device))
    return costs


def _lessons(trainer: Trainer, obstacle: str | None) -> Lessons:
    learners = [[trainer.distiller]]
    return Lessons(trainer.cfg, learners, trainer.device, obstacle=obstacle, ahead=1)


def _endless(trainer: Trainer) -> Iterator[Batch]:
    while True:
        yield from trainer.batches()


def _step(update: Callable[[StepInputs], object], lessons: Lessons, batch: Batch) -> None:
    """The teacher's forward pass and the student's update."""
    for (inputs,) in lessons.over([(batch,)]):
        update(inputs)


def main(arguments: Sequence[str] | None = None) -> Comparison:
    """Compare as the arguments say; print the table.

    Raises:
        TrainingFailedError: every run failed.
    """
    words, pairs = take_pairs(sys.argv[1:] if arguments is None else arguments, default_config())
    given = compare_parser().parse_intermixed_args(words)
    overrides = [*pairs, *given.overrides]
    with console_log():
        variants = read_variants(given.variants) if given.variants else {}
        comparison = compare(
            pair_settings(given, overrides)[0],
            given.methods or list(variants),
            given.seeds,
            given.output,
            overrides,
            variants=variants,
            together=given.together,
            costs=not given.no_costs,
        )
    if is_first():
        print(comparison.markdown())
        files = sorted(path.name for path in given.output.glob("*") if path.is_file())
        print(f"\n{given.output}: {', '.join(files)}, and a folder for each run")
    if not comparison.results:
        raise TrainingFailedError("no run produced a result; the reasons are below the table")
    return comparison


if __name__ == "__main__":
    run_command(main, interrupted="repeat the command to continue after the last epoch of each run")
