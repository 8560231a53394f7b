"""A run's report: one HTML file with embedded pictures, and the same figures as JSON."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from pcka.engine.run_folder import write_text

Log = logging.Logger | logging.LoggerAdapter

HTML, JSON = "report.html", "report.json"
TEMPLATE = "report.html.jinja"


class Card(NamedTuple):
    """A headline figure.

    Attributes:
        label: above it.
        value: with its unit.
        note: below it.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the rows.

    Attributes:
        headings: of the columns.
        rows: one cell per column.
        caption: below the table.
        prose: whether cells hold text that may wrap over several lines.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    prose: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture with its title.

    Attributes:
        title: above it.
        figure: drawn once, as SVG unless ``raster``.
        caption: below it.
        wide: whether it takes the full width of the page.
        raster: draw it as PNG: for photographs, or very many shapes.
    """

    title: str
    figure: Figure
    caption: str = ""
    wide: bool = False
    raster: bool = False

    @cached_property
    def source(self) -> str:
        """The image data, as the ``src`` of an ``img``."""
        kind, mime = ("png", "png") if self.raster else ("svg", "svg+xml")
        file = io.BytesIO()
        metadata = {} if self.raster else {"Date": None}  # the same picture gives the same bytes
        with matplotlib.rc_context({"svg.hashsalt": "pcka"}):
            self.figure.savefig(file, format=kind, dpi=120, metadata=metadata)
        return f"data:image/{mime};base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        title: heading of the section.
        text: a sentence or two below it.
        tables: shown first.
        pictures: shown next, side by side if there is room.
        folded: title -> table or text that is collapsed at first.
    """

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    folded: dict[str, Table | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A report of a run, for people and for programs.

    Attributes:
        title: of the page.
        lead: a sentence below it.
        cards: the headline figures.
        warnings: what is probably a mistake, a sentence or two each.
        sections: in order.
        data: the content of ``report.json``, apart from the warnings.
    """

    title: str
    lead: str
    cards: Sequence[Card]
    warnings: Sequence[str]
    sections: Sequence[Section]
    data: dict[str, Any]

    def html(self) -> str:
        """The page, which is self-contained."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template(TEMPLATE).render(report=self)

    def json(self) -> str:
        """The figures as JSON; NaN and infinity become ``null``."""
        content = {"warnings": list(self.warnings), **self.data}
        return json.dumps(_finite(content), indent=1) + "\n"

    def write(self, folder: Path) -> Path:
        """Write both files; return the path of the page."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / JSON, self.json())
        write_text(folder / HTML, self.html())
        return folder / HTML


def attempt(make: Callable[[], Report], folder: Path, log: Log, again: str) -> None:
    """Write the report of finished work; errors are logged, not raised.

    Args:
        make: measures, and returns the report.
        folder: of the report.
        log: logs where the report is, or why there is none.
        again: the command that tries again.
    """
    try:
        log.info("report: %s", make().write(folder))
    except Exception as error:  # from a model, a device or a disk: of many types
        reason = f"{type(error).__name__}: {error}"
        log.warning("the report was not written (%s); retry with %s", reason, again)


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
