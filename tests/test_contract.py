"""House rules that import-linter cannot state."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_one_module_alone_touches_the_compiled_operators():
    users = {
        str(path.relative_to(ROOT))
        for folder in ("pcka", "classification", "benchmarks", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if "torch.ops.pcka" in path.read_text()
    }
    assert users == {"pcka/ops/_library.py"}


def test_every_operator_has_a_file_of_the_same_name_on_both_sides():
    cpu = {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    cuda = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert cpu == cuda
    schema = (ROOT / "csrc" / "schema.cpp").read_text()
    assert all(f'"{name}' in schema for name in cpu)
