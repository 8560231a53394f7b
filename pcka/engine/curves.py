"""Curves of a training run: panels side by side in one picture."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from types import MappingProxyType
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[float, float]]  # (step or epoch, value)

# Okabe and Ito's palette, distinguishable to colour-blind readers; black is kept for totals.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_LINES = ("-", "--", "-.", ":")
TEACHER_COLOUR = "#666666"
_PANEL_INCHES = (5.0, 3.8)
_MOST_ABREAST = 3  # panels per row


class Panel(NamedTuple):
    """One panel of a picture.

    Attributes:
        title: above the panel.
        unit: label of its vertical axis.
        curves: name in the legend -> points.
        total: name of the curve that is drawn in black.
        best: name of the curve whose first maximum is marked.
        from_zero: whether the vertical axis includes 0.
        top: upper limit of the vertical axis; None to fit the data.
        across: name in the legend -> value of a horizontal line.
    """

    title: str
    unit: str
    curves: Mapping[str, Points]
    total: str = ""
    best: str = ""
    from_zero: bool = True
    top: float | None = None
    across: Mapping[str, float] = MappingProxyType({})


def method_style(index: int) -> tuple[str, str]:
    """Colour and line style of the ``index``-th method, term or stage, same in every picture."""
    # Both change together, so that lines can be told apart in greyscale too.
    return _COLOURS[index % len(_COLOURS)], _LINES[index % len(_LINES)]


def plot_panels(panels: Iterable[Panel], path: str | os.PathLike[str], *, x: str) -> bool:
    """Draw the panels that have curves, at most three per row; return whether there are any.

    Args:
        panels: in reading order; each curve has at least one point.
        path: image file to write; its suffix determines the format.
        x: what the horizontal axes count, from 0: ``"epoch"`` or ``"step"``.
    """
    drawn = [panel for panel in panels if panel.curves]
    if not drawn:
        return False
    width, height = _PANEL_INCHES
    rows = -(-len(drawn) // _MOST_ABREAST)
    columns = -(-len(drawn) // rows)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    last = max(map(_last, drawn))
    places = figure.subplots(rows, columns, squeeze=False).flat
    for panel, axes in zip(drawn, places):
        _draw(axes, panel, x, last)
        axes.set_title(panel.title)
    for axes in places:  # unused places
        axes.axis("off")
    figure.savefig(path, dpi=120)
    return True


def panel_figure(panel: Panel, *, x: str) -> Figure:
    """A panel with curves as a figure of its own, without its title."""
    figure = Figure(figsize=_PANEL_INCHES, layout="constrained")
    _draw(figure.subplots(), panel, x, _last(panel))
    return figure


def _last(panel: Panel) -> float:
    return max(points[-1][0] for points in panel.curves.values() if points)


def _draw(axes: Axes, panel: Panel, x: str, last: float) -> None:
    names = [name for name in panel.curves if name != panel.total]
    for index, name in enumerate(names):
        if panel.curves[name]:
            _draw_curve(axes, name, panel.curves[name], *method_style(index))
    if panel.total in panel.curves:
        _draw_curve(axes, panel.total, panel.curves[panel.total], "black", "-")
    if panel.best in panel.curves:
        at, value = max(panel.curves[panel.best], key=itemgetter(1))
        label = f"best: {value:.2f}, {x} {at:g}"
        axes.plot(at, value, "*", color="black", markersize=11, label=label)
    for name, value in panel.across.items():
        label = f"{name}: {value:.2f}"
        axes.axhline(value, color=TEACHER_COLOUR, linestyle=(0, (6, 3)), label=label)
    bottom, top = axes.get_ylim()
    if top - bottom < 1e-9:  # nothing but zeros
        bottom, top = bottom - 0.05, top + 1
    axes.set_ylim(min(0, bottom) if panel.from_zero else bottom, panel.top or top)
    axes.set(xlabel=x, ylabel=panel.unit)
    axes.set_xlim(0, max(last, 1) * 1.02)  # so that the last marker is not clipped
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small" if len(panel.curves) <= len(_COLOURS) else "x-small")


def _draw_curve(axes: Axes, name: str, points: Points, colour: str, dash: str) -> None:
    """Draw a curve; a single point gets a horizontal line, to be read off and compared."""
    if len(points) > 1:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour, linestyle=dash, marker=".", markersize=4, label=name)
        return
    ((at, value),) = points
    axes.plot(at, value, color=colour, marker="o", clip_on=False, label=f"{name}: {value:.3g}")
    axes.axhline(value, color=colour, alpha=0.4, linestyle="--")


def plot_curves(
    metrics: Sequence[Mapping[str, float]],
    path: str | os.PathLike[str],
    teacher_accuracy: float | None = None,
) -> None:
    """Draw the panels of :func:`classifier_panels` side by side.

    Args:
        metrics: as there.
        path: image file to write; its suffix determines the format.
        teacher_accuracy: as there.

    Raises:
        ValueError: as there, or nothing to draw.
    """
    if not plot_panels(classifier_panels(metrics, teacher_accuracy), path, x="epoch"):
        keys = list(dict.fromkeys(key for entry in metrics for key in entry))
        raise ValueError(
            "metrics: nothing to draw; expected keys 'loss_...', 'accuracy', 'train_accuracy' or "
            f"'cka_...', got {keys}"
        )


def classifier_panels(
    metrics: Sequence[Mapping[str, float]], teacher_accuracy: float | None = None
) -> list[Panel]:
    """Losses, accuracy, layer-wise CKA and gradients of a classifier's run by epoch.

    A panel without any values is left out; an epoch may lack any value.

    Args:
        metrics: one mapping per epoch: ``epoch``; ``loss_<term>``; ``accuracy`` (evaluation),
            ``accuracy_ema`` (of the averaged student) and ``train_accuracy``, in percent;
            ``cka_<layer>``, in [0, 1]; ``gradient_share_<term>`` and ``gradient_cosine_<term>``.
            Other keys are ignored.
        teacher_accuracy: in percent, drawn as a horizontal line. None: there is no teacher.

    Raises:
        ValueError: an entry without ``epoch``.
    """
    if any("epoch" not in entry for entry in metrics):
        raise ValueError("metrics: every entry must hold 'epoch'")
    keys = list(dict.fromkeys(key for entry in metrics for key in entry))
    points = {key: [(e["epoch"], e[key]) for e in metrics if key in e] for key in keys}

    def starting(prefix: str) -> dict[str, Points]:
        return {key.removeprefix(prefix): points[key] for key in keys if key.startswith(prefix)}

    accuracies = {
        "evaluation": "accuracy", "averaged student": "accuracy_ema", "train": "train_accuracy"
    }  # fmt: skip
    panels = [
        Panel("Weighted loss terms", "loss", starting("loss_"), total="total"),
        Panel(
            "Top-1 accuracy",
            "accuracy (%)",
            {name: points[key] for name, key in accuracies.items() if key in points},
            best="evaluation",
            from_zero=False,
            across={} if teacher_accuracy is None else {"teacher": teacher_accuracy},
        ),
        Panel("Teacher\N{EN DASH}student CKA", "CKA", starting("cka_"), top=1.02),
        Panel("Gradients: lengths", "share of the norms", starting("gradient_share_"), top=1.02),
        Panel("Gradients: directions", "cosine with cross-entropy's", starting("gradient_cosine_")),
    ]
    return [panel for panel in panels if panel.curves]


def plot_gradients(
    runs: Mapping[str, Sequence[Mapping[str, float]]], path: str | os.PathLike[str]
) -> bool:
    """Write the :func:`gradients_figure`, if there is one; return whether there is.

    Args:
        runs: as there.
        path: image file to write; its suffix determines the format.
    """
    figure = gradients_figure(runs)
    if figure is not None:
        figure.savefig(path, dpi=120)
    return figure is not None


def gradients_figure(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure | None:
    """Draw the gradients of each loss term, runs side by side; None if none were measured.

    Top: each term's share of the gradient norms. Bottom: the cosine of its gradient with
    cross-entropy's, whose own is left out. A term has the same style in every run.

    Args:
        runs: name -> metrics as for :func:`classifier_panels`; runs without gradients are left
            out.
    """
    measured = {}
    for name, metrics in runs.items():
        if terms := list(dict.fromkeys(key for entry in metrics for key in _terms(entry))):
            measured[name] = terms
    if not measured:
        return None
    every_term = list(dict.fromkeys(term for terms in measured.values() for term in terms))
    figure = Figure(figsize=(2.6 * len(measured) + 1, 5.2), layout="constrained")
    grid = figure.subplots(2, len(measured), squeeze=False, sharex=True, sharey="row")
    for (above, below), (name, terms) in zip(grid.T, measured.items(), strict=True):
        for term in terms:
            colour, dash = method_style(every_term.index(term))
            style = {"color": colour, "linestyle": dash, "marker": ".", "label": term}
            for axes, kind in ((above, "share"), (below, "cosine")):
                key = f"gradient_{kind}_{term}"
                points = [(e["epoch"], e[key]) for e in runs[name] if key in e]
                if points and (kind, term) != ("cosine", "ce"):
                    axes.plot(*zip(*points, strict=True), **style)
        above.set(title=name)
        above.legend(fontsize="x-small")
        below.set(xlabel="epoch")
        below.axhline(0, color="black", linewidth=0.8)
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0][0].set(ylabel="share of the norms", ylim=(0, 1.02))
    grid[1][0].set(ylabel="cosine with cross-entropy's")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    return figure


def _terms(entry: Mapping[str, float]) -> list[str]:
    """The terms whose gradients were measured in an epoch."""
    prefix = "gradient_share_"
    return [key.removeprefix(prefix) for key in entry if key.startswith(prefix)]
