from __future__ import annotations

import pytest

from pcka.engine.config import ConfigError
from tools import results_tables
from tools.results_tables import main

FIGURES = """method,seed,last_accuracy,best_accuracy
ce,0,60.0,61.0
ce,1,62.0,62.0
kd,0,65.0,65.5
kd,1,67.5,67.5
"""
PAGE = """Before.

<!-- table: figures.csv
     {settings} -->

old

<!-- end of table -->

After.
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write figures and a page with a table of them; gives the page."""
    monkeypatch.setattr(results_tables, "ROOT", tmp_path)
    (tmp_path / "figures.csv").write_text(FIGURES)

    def page(*settings):
        path = tmp_path / "page.md"
        path.write_text(PAGE.replace("{settings}", "\n     ".join(settings)))
        return path

    return page


def cells(page):
    """The lines of the table but the one below the headings."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if "--" not in line
    ]


def test_a_table_is_made_of_its_figures_and_the_rest_of_the_page_stays(write):
    page = write("columns: last_accuracy = last epoch (%)", "difference: minus ce (%)")
    main([str(page)])
    assert cells(page) == [
        ["method", "seeds", "last epoch (%)", "minus ce (%)", "difference"],
        ["ce", "2", "61.00 ± 1.41", "", ""],
        ["kd", "2", "66.25 ± 1.77", "+5.25 ± 0.35", "above"],
    ]
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- table: figures.csv")
    assert text.endswith("<!-- end of table -->\n\nAfter.\n")
    assert "old" not in text


def test_rows_are_chosen_and_ordered_and_columns_can_be_several(write):
    page = write("rows: kd, ce", "columns: best_accuracy, last_accuracy = last")
    main([str(page)])
    headings, *rows = cells(page)
    assert headings[2:4] == ["best_accuracy", "last"]
    assert [row[0] for row in rows] == ["kd", "ce"]
    assert rows[1][2:5] == ["61.50 ± 0.71", "61.00 ± 1.41", "-5.00 ± 0.71"]


def test_checking_names_the_page_that_is_out_of_date_and_changes_nothing(write):
    page = write("rows: ce")
    before = page.read_text()
    with pytest.raises(ConfigError, match=r"page.md: a table does not match its figures"):
        main(["--check", str(page)])
    assert page.read_text() == before
    main([str(page)])
    main(["--check", str(page)])
    main([str(page)])
    assert page.read_text().count("| ce") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rows: ce, dkd"], "figures.csv has no dkd"),
        (["columns: accuracy"], "figures.csv has no accuracy"),
        (["order: ce"], "has no setting order"),
    ],
)
def test_what_a_table_cannot_be_made_of_is_named(write, settings, message):
    with pytest.raises(ConfigError, match=message):
        main([str(write(*settings))])


def test_figures_that_are_missing_are_named(write, tmp_path):
    page = write("rows: ce")
    (tmp_path / "figures.csv").write_text("method,seed,accuracy\n")
    with pytest.raises(ConfigError, match=r"page.md: figures.csv has no runs"):
        main([str(page)])
    (tmp_path / "figures.csv").unlink()
    with pytest.raises(ConfigError, match=r"page.md: the table's figures figures.csv are missing"):
        main([str(page)])


def test_the_pages_say_what_their_figures_say():
    main(["--check"])


def test_the_tables_of_the_docs_are_what_their_figures_say():
    main(["--check"])
