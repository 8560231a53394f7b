"""Curves of a training run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Metrics = Sequence[Mapping[str, float]]

# Okabe and Ito's palette, told apart by colour-blind readers too; black is kept for totals.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_LINES = ("-", "--", "-.", ":")
_PANEL_INCHES = (5.0, 3.8)


def plot_curves(metrics: Metrics, path: str | os.PathLike[str]) -> None:
    """Draw losses, accuracy and layer-wise CKA of a run by epoch, side by side, into one picture.

    A panel without a figure in any epoch is left out; an epoch may lack any figure.

    Args:
        metrics: one mapping an epoch: ``epoch``; ``loss_<term>``; ``accuracy`` (evaluation) and
            ``train_accuracy``, in percent; ``cka_<layer>``, in [0, 1]. Other keys are passed over.
        path: picture to write; its suffix picks the format.

    Raises:
        ValueError: an entry without ``epoch``, or nothing to draw.
    """
    if any("epoch" not in entry for entry in metrics):
        raise ValueError("metrics: every entry must hold 'epoch'")
    panels = [(draw, keys) for draw, keys in _panels(metrics) if keys]
    if not panels:
        raise ValueError(
            "metrics: nothing to draw; expected keys 'loss_...', 'accuracy', 'train_accuracy' or "
            f"'cka_...', got {_keys(metrics)}"
        )
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    FigureCanvasAgg(figure)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (draw, keys) in zip(row, panels, strict=True):
        draw(axes, metrics, keys)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _panels(metrics: Metrics) -> list[tuple[Callable[[Axes, Metrics, list[str]], None], list[str]]]:
    keys = _keys(metrics)
    return [
        (_draw_losses, [key for key in keys if key.startswith("loss_")]),
        (_draw_accuracy, [key for key in ("train_accuracy", "accuracy") if key in keys]),
        (_draw_cka, [key for key in keys if key.startswith("cka_")]),
    ]


def _keys(metrics: Metrics) -> list[str]:
    """Every key of any epoch, in order of first appearance."""
    return list(dict.fromkeys(key for entry in metrics for key in entry))


def _curve(metrics: Metrics, key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of the entries that hold ``key``."""
    present = [entry for entry in metrics if key in entry]
    return [entry["epoch"] for entry in present], [entry[key] for entry in present]


def _draw_curve(
    axes: Axes, metrics: Metrics, key: str, label: str, colour: str, line: str = "-"
) -> None:
    epochs, values = _curve(metrics, key)
    # A single epoch makes no line: the dots show it.
    axes.plot(epochs, values, color=colour, linestyle=line, marker=".", markersize=4, label=label)


def _draw_terms(axes: Axes, metrics: Metrics, keys: list[str], prefix: str) -> None:
    """One line a key; colour and dash change together, so that they stay apart in grey too."""
    for index, key in enumerate(keys):
        colour, line = _COLOURS[index % len(_COLOURS)], _LINES[index % len(_LINES)]
        _draw_curve(axes, metrics, key, key.removeprefix(prefix), colour, line)


def _draw_losses(axes: Axes, metrics: Metrics, keys: list[str]) -> None:
    terms = [key for key in keys if key != "loss_total"]
    _draw_terms(axes, metrics, terms, "loss_")
    if "loss_total" in keys:
        _draw_curve(axes, metrics, "loss_total", "total", "black")
    axes.set_title("Weighted loss terms")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))


def _draw_accuracy(axes: Axes, metrics: Metrics, keys: list[str]) -> None:
    for key, label, colour in (
        ("train_accuracy", "train", _COLOURS[1]),
        ("accuracy", "evaluation", _COLOURS[0]),
    ):
        if key in keys:
            _draw_curve(axes, metrics, key, label, colour)
    if "accuracy" in keys:
        epoch, accuracy = max(zip(*_curve(metrics, "accuracy"), strict=True), key=itemgetter(1))
        label = f"best: {accuracy:.2f} %, epoch {epoch:g}"
        axes.plot(epoch, accuracy, "*", color="black", markersize=11, label=label)
    axes.set_title("Top-1 accuracy")
    axes.set_ylabel("accuracy (%)")


def _draw_cka(axes: Axes, metrics: Metrics, keys: list[str]) -> None:
    _draw_terms(axes, metrics, keys, "cka_")
    axes.set_title("Teacher\N{EN DASH}student CKA")
    axes.set_ylabel("CKA")
    axes.set_ylim(top=1.02)
