"""Compare methods over seeds: ``python classification/compare.py --config-file F --methods M ...``.

Trains what is missing, and goes on where it was killed. Of each seed all methods are trained side
by side: the same start, order and augmentation, and one teacher that runs once for all of them. On
a GPU, which one small student leaves idle, the seeds are trained side by side as well.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from fvcore.common.config import CfgNode

from classification.command_line import config_arguments, console_log
from classification.comparison import Comparison, write_comparison
from classification.config import load_config
from classification.cost import measure_costs
from classification.experiment import run_side_by_side
from pcka.distributed import rank
from pcka.engine.command import TrainingFailedError, run_command
from pcka.engine.config import ConfigError
from pcka.engine.launch import is_first, process_group
from pcka.engine.run_folder import remove_temporaries

logger = logging.getLogger("classification")


def compare(
    config_file: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    overrides: Sequence[str] = (),
    *,
    together: int = 8,
    costs: bool = True,
) -> Comparison:
    """Train each method with each seed into ``output/<method>/seed<seed>``, and compare them.

    Args:
        config_file: data, student and teacher.
        methods: names of method files; the first is what the others are compared with.
        seeds: of the students' start, order and augmentation.
        output: ``comparison.md``, ``.csv`` and ``.png`` go there too.
        overrides: ``KEY VALUE`` pairs for all runs.
        together: so many students are trained side by side; they share the device's memory.
        costs: measure what a step of each method costs, once the runs are there.

    Raises:
        ConfigError: a method named twice, or what :func:`run_side_by_side` refuses.
    """
    if len(set(methods)) != len(methods) or len(set(seeds)) != len(seeds):
        raise ConfigError(f"methods and seeds: expected each one once, got {methods} and {seeds}")

    def configure(method: str, seed: int) -> CfgNode:
        own = ["SEED", str(seed), "OUTPUT_DIR", str(output / method / f"seed{seed}")]
        return load_config(config_file, [*overrides, *own], method)

    # All of them before the first is trained, so that a wrong name costs no time.
    cfgs = {(method, seed): configure(method, seed) for method in methods for seed in seeds}
    first = cfgs[methods[0], seeds[0]]
    comparison = Comparison(first, methods)
    with process_group(first.DEVICE) as device:
        if rank() == 0:
            remove_temporaries(output)
        for group in _groups(methods, seeds, together, seeds_too=device.type == "cuda"):
            results = run_side_by_side([cfgs[run] for run in group], resume=True)
            for (method, seed), result in zip(group, results, strict=True):
                if isinstance(result, TrainingFailedError):
                    logger.warning("%s, seed %d: failed: %s", method, seed, result)
                comparison.add(method, seed, result)
            _write(comparison, output)
        if costs:
            by_method = {method: cfgs[method, seeds[0]] for method in methods}
            comparison.costs = measure_costs(by_method, output / "costs.json")
            _write(comparison, output)
    return comparison


def _write(comparison: Comparison, output: Path) -> None:
    """The first process alone writes."""
    if rank() == 0:
        write_comparison(comparison, output)


def _groups(
    methods: Sequence[str], seeds: Sequence[int], size: int, *, seeds_too: bool
) -> list[list[tuple[str, int]]]:
    """Runs (method, seed) that are trained side by side: of one seed, or of several."""
    by_seed = [[(method, seed) for method in methods] for seed in seeds]
    rows = [[run for row in by_seed for run in row]] if seeds_too else by_seed
    return [row[start : start + size] for row in rows for start in range(0, len(row), size)]


def main(arguments: Sequence[str] | None = None) -> Comparison:
    """Compare as the arguments say; print the table.

    Raises:
        TrainingFailedError: every run failed.
    """
    parser = config_arguments("Train several methods with several seeds, and compare them.")
    parser.add_argument(
        "--methods", nargs="+", required=True, metavar="M", help="names that --list prints"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S")
    parser.add_argument("--output", type=Path, default=Path("output/comparison"), metavar="DIR")
    parser.add_argument(
        "--together", type=_positive, default=8, metavar="N", help="students trained side by side"
    )
    parser.add_argument("--no-costs", action="store_true", help="do not measure what steps cost")
    # KEY VALUE pairs may follow the lists, which would swallow them: they come after "--".
    given = parser.parse_args(arguments)
    if keys := [word for word in given.methods if "." in word]:
        parser.error(f"{keys[0]} is no method; KEY VALUE pairs come last, behind a --")
    with console_log():
        comparison = compare(
            Path(given.config_file),
            given.methods,
            given.seeds,
            given.output,
            given.overrides,
            together=given.together,
            costs=not given.no_costs,
        )
    if is_first():
        print(comparison.markdown())
    if not comparison.results:
        raise TrainingFailedError("no run came to a result; the reasons stand below the table")
    return comparison


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


if __name__ == "__main__":
    run_command(main, interrupted="the same command goes on after the last epoch of each run")
