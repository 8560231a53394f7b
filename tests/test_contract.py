"""House rules that import-linter cannot state."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def names_operators(source: str) -> bool:
    """Whether a module reaches into ``torch.ops.pcka``, or registers something there."""
    tree = ast.walk(ast.parse(source))
    return any(
        (
            isinstance(node, ast.Attribute)
            and node.attr == "pcka"
            and "ops" in ast.unparse(node.value)
        )
        or (isinstance(node, ast.Constant) and str(node.value).startswith("pcka::"))
        for node in tree
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("torch.ops.pcka.cka(x)", True),
        ("torch.library.opcheck('pcka::cka')", True),
        ("import pcka.ops\npcka.ops.cka(x)  # torch.ops.pcka", False),
    ],
)
def test_what_counts_as_touching_the_operators(source, expected):
    assert names_operators(source) == expected


def test_one_module_alone_touches_the_compiled_operators():
    users = {
        str(path.relative_to(ROOT))
        for folder in ("pcka", "classification", "detection", "benchmarks", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if names_operators(path.read_text())
    }
    assert users == {"pcka/ops/_library.py"}


def test_every_operator_has_a_file_of_the_same_name_on_both_sides():
    cpu = {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    cuda = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert cpu == cuda
    schema = (ROOT / "csrc" / "schema.cpp").read_text()
    assert all(f'"{name}' in schema for name in cpu)
