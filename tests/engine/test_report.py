from __future__ import annotations

import base64
import json
import math
import re

import pytest
from matplotlib.figure import Figure

from pcka.engine.report import Card, Picture, Report, Section, Table


def drawn(value=1.0):
    figure = Figure(figsize=(2, 2))
    figure.subplots().plot([0, value])
    return figure


@pytest.fixture
def report():
    return Report(
        title="small <b>student</b>",
        lead="ce & kd",
        cards=[Card("top-1", "48.00 %", "student")],
        warnings=["the loss <is> high"],
        sections=[
            Section(
                "Models",
                tables=[Table(["", "top-1"], [["cat & dog", "1.0"]], "of few images")],
                pictures=[Picture("Curve", drawn()), Picture("Photo", drawn(), raster=True)],
                folded={"all": "A: <1>", "more": Table(["class"], [["x<y"]])},
            )
        ],
        data={"top1": 48.0, "ap": [math.nan, math.inf, 1.5], 1: "one"},
    )


def test_the_page_needs_no_other_file(report):
    page = report.html()
    sources = re.findall(r'src="([^"]*)"', page)
    assert [source.partition(";")[0] for source in sources] == [
        "data:image/svg+xml", "data:image/png",
    ]  # fmt: skip
    assert not re.findall(r"<script|<link|@import|url\(|href=", page)
    picture = base64.b64decode(sources[0].partition(",")[2])
    assert b"<svg" in picture


def test_what_is_shown_is_text_and_no_markup(report):
    page = report.html()
    for text in (
        "small &lt;b&gt;student&lt;/b&gt;", "ce &amp; kd", "the loss &lt;is&gt; high",
        "cat &amp; dog", "of few images", "A: &lt;1&gt;", "x&lt;y", "48.00 %",
    ):  # fmt: skip
        assert text in page


def test_without_warnings_there_is_no_box(report):
    quiet = Report(report.title, report.lead, report.cards, [], [], {})
    assert "Warnings" in report.html() and "Warnings" not in quiet.html()


def test_the_json_is_json_whatever_the_figures(report):
    content = json.loads(report.json(), parse_constant=pytest.fail)
    assert content == {
        "warnings": ["the loss <is> high"], "top1": 48.0, "ap": [None, None, 1.5], "1": "one",
    }  # fmt: skip


def test_both_files_are_written_and_the_same_report_is_the_same_bytes(report, tmp_path):
    assert report.write(tmp_path / "a") == tmp_path / "a" / "report.html"
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"report.html", "report.json"}
    assert Picture("Curve", drawn()).source == Picture("Curve", drawn()).source
