"""What both trainers' configurations share: their error, near names, and how two of them differ."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from pcka.engine.yaml_files import flatten


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the way out."""


def near_names(word: str, known: Iterable[str]) -> str:
    """Say which known names a word may have meant: by its last part, or by spelling."""
    by_upper = {name.upper(): name for name in known}
    matches = [name for name in by_upper if name.endswith(word.upper().rpartition(".")[2])]
    matches += difflib.get_close_matches(word.upper(), by_upper, n=3)
    names = [by_upper[match] for match in dict.fromkeys(matches)]
    return f"{'near matches' if names else 'known'}: {', '.join(names or by_upper.values())}"


def set_key(tree: Any, key: str, value: object) -> None:
    """Set the leaf at a dotted key of a tree of mappings."""
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree[section]
    tree[leaf] = value


def differing_keys(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, tuple[object, object]]:
    """Dotted key -> (old value, new value) of what differs; a key that ``old`` lacks is None there.

    Compared as YAML holds them: a tuple is a list.
    """
    before, after = (flatten(yaml.safe_load(_dump(tree))) for tree in (old, new))
    return {
        key: (before.get(key), value) for key, value in after.items() if before.get(key) != value
    }


def _dump(tree: Mapping[str, Any]) -> str:
    text: str = tree.dump() if hasattr(tree, "dump") else yaml.safe_dump(dict(tree))
    return text
