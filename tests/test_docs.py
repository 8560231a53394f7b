"""The pages name what exists: files, headings, modules, and the functions behind links."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks" / "README.md"]
FOLDERS = "benchmarks|classification|configs|csrc|detection|docs|pcka|tests|tools"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


def links(page: Path) -> Iterator[tuple[str, Path, str]]:
    """Text, file and heading of every link within the project."""
    for text, target in re.findall(r"\[([^][]+)\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if "://" not in target:
            yield text, (page.parent / path).resolve() if path else page, heading


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def definitions(path: Path) -> set[str]:
    """Names of the classes, functions and methods (``Class.method``) of a file."""
    if path.suffix != ".py":
        return set(re.findall(r"\b(\w+)\(", path.read_text()))
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (part.name for part in node.body if isinstance(part, ast.FunctionDef))
            names |= {f"{node.name}.{method}" for method in methods}
    return names


@pages
def test_links_lead_to_files_and_headings(page):
    for text, path, heading in links(page):
        assert path.exists(), f"[{text}]: no file {path}"
        assert not heading or heading in headings(path), f"[{text}]: no heading #{heading}"


@pages
def test_links_of_functions_lead_to_the_file_that_defines_them(page):
    for text, path, _ in links(page):
        if re.fullmatch(r"`[\w.]+`", text) and path.suffix in {".py", ".cpp"}:
            assert text.strip("`") in definitions(path), f"{text} is not in {path}"


# docs/extending.md names files that its reader makes; tests/test_extending.py makes them.
@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "extending"], ids=name_of)
def test_paths_and_modules_exist(page):
    text = page.read_text()
    for path in re.findall(rf"(?<![\w/.\"])(?:{FOLDERS})/[\w./-]*", text):
        assert (ROOT / path.rstrip(".")).exists(), path
    for module in re.findall(rf"python -m ((?:{FOLDERS})[\w.]*)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_a_link_of_a_function_that_moved_is_seen():
    assert "Distiller.terms" in definitions(ROOT / "pcka" / "distiller.py")
    assert "Distiller.term" not in definitions(ROOT / "pcka" / "distiller.py")
    assert "patch_cka" in definitions(ROOT / "csrc" / "alignment.cpp")
