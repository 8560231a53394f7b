"""What mutate.py lists: mutants of the kernels as they stand, and survivors that are among them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import tomllib

_SPEC = importlib.util.spec_from_file_location("mutate", Path(__file__).with_name("mutate.py"))
assert _SPEC is not None and _SPEC.loader is not None
mutate = importlib.util.module_from_spec(_SPEC)
sys.modules["mutate"] = mutate
_SPEC.loader.exec_module(mutate)

ROOT = Path(__file__).resolve().parents[2]


def every_mutant() -> list[mutate.Mutant]:
    return [m for file in sorted((ROOT / mutate.KERNELS).glob("*")) for m in mutate.mutants(file)]


def test_every_survivor_is_a_mutant_of_the_kernels_as_they_stand():
    mutants = {(m.file, m.kind, m.source) for m in every_mutant()}
    listed = tomllib.loads((ROOT / "tests/emulation/survivors.toml").read_text())["survivor"]
    stale = [s for s in listed if (s["file"], s["mutation"], s["line"]) not in mutants]
    assert stale == []


def test_a_mutant_changes_one_place_of_its_line():
    for mutant in every_mutant()[::10]:
        text = (ROOT / mutate.KERNELS / mutant.file).read_text()
        before, after = text.split("\n"), mutant.applied_to(text).split("\n")
        changed = [i for i, (a, b) in enumerate(zip(before, after), 1) if a != b]
        assert len(before) == len(after) and changed == [mutant.line]
