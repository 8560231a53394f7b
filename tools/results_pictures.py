"""Draw the docs' pictures of results from their data: ``python -m tools.results_pictures``.

A picture carries a digest of the data that it was drawn from; ``--check`` changes nothing and fails
if the data has changed since.
"""

from __future__ import annotations

import csv
import hashlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from pcka.engine.arguments import command_parser
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.curves import gradients_figure, method_style

ROOT = Path(__file__).parents[1]
LABELS = {
    "ce": "student alone",
    "kd": "KD",
    "kd_std": "KD, standardized logits",
    "dkd": "DKD",
    "dist": "DIST",
    "nkd": "NKD",
    "wttm": "WTTM",
    "rcka": "RCKA, published weights",
    "kd_fcka10": "KD + feature CKA",
    "kd_pkd30": "KD + PKD",
    "kd_fitnet30": "KD + FitNet",
    "kd_sp1000": "KD + SP",
    "kd_at300": "KD + AT",
    "kd_pkd_fcka": "KD + PKD + feature CKA",
    "dist_fitnet10": "DIST + FitNet",
    "dist_pkd30_fcka10": "DIST + PKD + feature CKA",
    "dist_fitnet_fcka": "DIST + FitNet + feature CKA",
}
SHOWN = (  # of the variants whose gradients were measured
    "fcka10",
    "kd_fcka10_unbiased",
    "kd_fcka10_uncentered",
    "kd_sp1000",
    "kd_pkd30_fcka10",
    "dist_pkd30_fcka10",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the pictures that are out of date; with ``--check``, fail at the first.

    Raises:
        ConfigError: with ``--check``, a picture whose data has changed.
    """
    parser = command_parser("Draw the docs' pictures from their figures.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if out of date")
    given = parser.parse_args(arguments)
    for name, (figures, draw) in PICTURES.items():
        path, source = ROOT / "docs" / "pictures" / name, ROOT / "benchmarks" / "results" / figures
        stamp = f"{figures} {hashlib.sha256(source.read_bytes()).hexdigest()}"
        if path.exists() and stamp in path.read_text():
            continue
        if given.check:
            raise ConfigError(
                f"{path}: its figures have changed; run python -m tools.results_pictures"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with source.open(newline="") as file:
            figure = draw(list(csv.DictReader(file)))
        _write(figure, path, stamp)
        print(f"{path}: drawn", file=sys.stderr)


def _write(figure: Figure, path: Path, stamp: str) -> None:
    """Write an SVG with text as text, and the same file every time."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pcka"}):
        figure.savefig(path, metadata={"Description": stamp, "Date": None})


def accuracies(rows: Sequence[Mapping[str, str]]) -> Figure:
    """One row per method: a dot per seed, a bar up to their mean; best on top.

    Args:
        rows: with ``method`` and ``last_accuracy``, as ``compare.py`` writes them.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(float(row["last_accuracy"]))
    means = {method: statistics.mean(values) for method, values in found.items()}
    order = sorted(found, key=means.__getitem__)
    figure = Figure(figsize=(7.0, 0.27 * len(order) + 0.9), layout="constrained")
    axes = figure.subplots()
    colours = ["#999999" if method == "ce" else method_style(0)[0] for method in order]
    axes.barh(range(len(order)), [means[m] for m in order], color=colours, height=0.62, alpha=0.75)
    for height, method in enumerate(order):
        axes.plot(found[method], [height] * len(found[method]), "k.", markersize=4)
        beside = max(found[method]) + 0.6
        axes.text(beside, height, f"{means[method]:.1f}", va="center", fontsize="small")
    axes.set_yticks(range(len(order)), [LABELS.get(method, method) for method in order])
    axes.set(xlabel="accuracy on the test images (%)", xlim=(0, max(means.values()) + 5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.02)
    return figure


def gradients(rows: Sequence[Mapping[str, str]]) -> Figure:
    """The :func:`pcka.engine.curves.gradients_figure` of ``SHOWN``.

    Args:
        rows: with ``method``, ``epoch``, ``term``, ``share`` and ``cosine``.

    Raises:
        ConfigError: none of them has gradients.
    """
    epochs: dict[str, dict[int, dict[str, float]]] = {name: {} for name in SHOWN}
    for row in rows:
        if row["method"] in epochs:
            epoch = int(row["epoch"])
            entry = epochs[row["method"]].setdefault(epoch, {"epoch": epoch})
            for kind in ("share", "cosine"):
                entry[f"gradient_{kind}_{row['term']}"] = float(row[kind])
    figure = gradients_figure({name: list(found.values()) for name, found in epochs.items()})
    if figure is None:
        raise ConfigError(f"expected gradients of {', '.join(SHOWN)}")
    return figure


PICTURES: dict[str, tuple[str, Callable[[Sequence[Mapping[str, str]]], Figure]]] = {
    "cifar100.svg": ("cifar100_short.csv", accuracies),
    "gradients.svg": ("cifar100_gradients.csv", gradients),
}


if __name__ == "__main__":
    run_command(main)
