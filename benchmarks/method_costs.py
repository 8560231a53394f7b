"""Cost of every method's training step, relative to cross-entropy alone.

``python -m benchmarks.method_costs [--rounds R] [--methods M ...]``. resnet56 -> resnet20 on random
images of CIFAR's size and count, batch 64, in the recipe's configuration; steps take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.classification_step import STUDENT, TEACHER, configure, random_images
from benchmarks.harness import markdown
from classification.compare import measure_costs
from classification.config import method_files
from pcka.engine.cost import Cost


def main(arguments: Sequence[str] | None = None) -> dict[str, Cost]:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(method_files()), metavar="M")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    methods = ["ce", *(method for method in given.methods if method != "ce")]
    sets = random_images(given.images, 100)
    with TemporaryDirectory() as folder:
        cfgs = {method: configure(method, Path(folder)) for method in methods}
        path = Path(folder) / "costs.json"
        costs = measure_costs(cfgs, path, rounds=given.rounds, image_sets=sets)
    rows = [
        [
            method,
            f"{cost.milliseconds:.2f}",
            f"{cost.milliseconds / costs['ce'].milliseconds:.2f}",
            f"{cost.mebibytes:.0f}",
        ]
        for method, cost in costs.items()
    ]
    print(f"{TEACHER} -> {STUDENT}, batch 64, {given.threads} threads, median of {given.rounds}")
    print(markdown(["method", "ms / image", "/ cross-entropy", "peak of the step (MiB)"], rows))
    return costs


if __name__ == "__main__":
    main()
