"""A run's report: one HTML file that holds its pictures, and the same figures as JSON."""

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
    """A figure that is read first.

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
    """Text in rows; the first column names them.

    Attributes:
        headings: of the columns.
        rows: of as many cells.
        caption: below the table.
        prose: cells are words, which may take several lines.
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
        figure: is drawn once, as SVG.
        caption: below it.
        wide: takes the whole width of a page.
        raster: drawn as PNG: of photographs, or of very many shapes.
    """

    title: str
    figure: Figure
    caption: str = ""
    wide: bool = False
    raster: bool = False

    @cached_property
    def source(self) -> str:
        """The picture itself, as the ``src`` of an ``img``."""
        kind, mime = ("png", "png") if self.raster else ("svg", "svg+xml")
        file = io.BytesIO()
        metadata = {} if self.raster else {"Date": None}  # the same picture, the same bytes
        with matplotlib.rc_context({"svg.hashsalt": "pcka"}):
            self.figure.savefig(file, format=kind, dpi=120, metadata=metadata)
        return f"data:image/{mime};base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True)
class Section:
    """A part of the page under its heading.

    Attributes:
        title: of the part.
        text: a sentence or two below it.
        tables: first.
        pictures: then, side by side where there is room.
        folded: title -> a table or a text that is shown when it is asked for.
    """

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    folded: dict[str, Table | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a person and what a program want to know of a run.

    Attributes:
        title: of the page.
        lead: a sentence below it.
        cards: the figures that are read first.
        warnings: what is probably not as it was meant, a sentence or two each.
        sections: in their order.
        data: the content of ``report.json``, beside the warnings.
    """

    title: str
    lead: str
    cards: Sequence[Card]
    warnings: Sequence[str]
    sections: Sequence[Section]
    data: dict[str, Any]

    def html(self) -> str:
        """The page, which needs no other file."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template(TEMPLATE).render(report=self)

    def json(self) -> str:
        """The figures; what is no number is ``null``."""
        content = {"warnings": list(self.warnings), **self.data}
        return json.dumps(_finite(content), indent=1) + "\n"

    def write(self, folder: Path) -> Path:
        """Write both files; return the path of the page."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / JSON, self.json())
        write_text(folder / HTML, self.html())
        return folder / HTML


def attempt(make: Callable[[], Report], folder: Path, log: Log, again: str) -> None:
    """Write the report of what has come to its end, and stands whatever happens here.

    Args:
        make: measures, and makes the report.
        folder: of the report.
        log: is told where it is, or why there is none.
        again: what tries it again.
    """
    try:
        log.info("report: %s", make().write(folder))
    except Exception as error:  # of a model, a device or a disk: of many types
        reason = f"{type(error).__name__}: {error}"
        log.warning("the report is not written (%s); %s tries again", reason, again)


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
