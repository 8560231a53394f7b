"""Configuration code shared by both trainers: YAML with bases, typed values, suggestions."""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml

# Per-stage settings of a loss: lists in the configuration; a single value applies to all stages.
PER_STAGE = ("WEIGHTS", "FEATURE_WEIGHTS", "PATCH_SIZES")
# Settings that are free-form mappings: each is a single value, not a section.
FREE = ("KWARGS",)

BASE_KEY = "_BASE_"


class ConfigError(ValueError):
    """An unusable configuration; the message names the key and how to fix it."""


def near_names(word: str, known: Iterable[str]) -> str:
    """Suggest known names that a word may stand for, by its last part or by spelling."""
    known = list(known)
    names = _matches(word, known)
    return f"{'near matches' if names else 'known'}: {', '.join(names or known)}"


def unknown_key(key: str, known: Iterable[str], source: str) -> ConfigError:
    """The error for a key that does not exist; it names near matches, or else the sections."""
    known = list(known)
    names = _matches(key, known)
    sections = dict.fromkeys(name.partition(".")[0] for name in known)
    near = f"near matches: {', '.join(names)}" if names else f"sections: {', '.join(sections)}"
    return ConfigError(f"{source}: unknown key {key!r}; {near}")


def _matches(word: str, known: Sequence[str]) -> list[str]:
    by_upper = {name.upper(): name for name in known}
    matches = [name for name in by_upper if name.endswith(word.upper().rpartition(".")[2])]
    matches += difflib.get_close_matches(word.upper(), by_upper, n=3)
    return [by_upper[match] for match in dict.fromkeys(matches)]


def merge_leaves(
    tree: Any,
    leaves: Mapping[str, object],
    source: str,
    proposed: Callable[[], Iterable[str]] = tuple,
) -> None:
    """Set dotted keys of a tree, converting the values to the keys' types.

    Args:
        tree: nested mappings; the current values define the keys and their types.
        leaves: dotted key -> value. A string is parsed as YAML (``true``, ``[a, b]``) or Python
            (``1e-4``) if the key expects another type.
        source: where the values come from, for messages.
        proposed: returns further keys to suggest for an unknown one.

    Raises:
        ConfigError: an unknown key (close matches are named), or a value of the wrong type.
    """
    known = flatten(tree)
    for key, value in leaves.items():
        if key not in known:
            raise unknown_key(key, [*known, *proposed()], source)
        *sections, leaf = key.split(".")
        node, value = reduce(getitem, sections, tree), _coerced(key, value, known[key], source)
        node[leaf] = type(node)(value) if isinstance(value, Mapping) else value


def import_modules(names: Iterable[object], key: str) -> None:
    """Import the modules that a key names, installed or in the working directory.

    Raises:
        ConfigError: a module that cannot be imported.
    """
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    for name in names:
        try:
            importlib.import_module(str(name))
        except ImportError as error:
            dotted = str(name).removesuffix(".py").replace(os.sep, ".")
            meant = f"; did you mean {dotted!r}?" * (dotted != name)
            raise ConfigError(
                f"{key}: {name!r} cannot be imported ({error}); name a module that is installed or "
                f"is in {folder!r}{meant}"
            ) from error


def pairs_of(overrides: Sequence[Any], source: str = "the command line") -> list[tuple[str, Any]]:
    """The words ``KEY VALUE ...`` of a command line or a list, as pairs.

    Args:
        overrides: the words; those of a list may hold values of any type.
        source: where they come from, for messages.

    Raises:
        ConfigError: a key without a value, or one that is not a name.
    """
    if len(overrides) % 2 or not all(isinstance(key, str) for key in overrides[::2]):
        words = " ".join(map(str, overrides))
        raise ConfigError(f"{source}: expected pairs of KEY VALUE, got {words!r}")
    return list(zip(overrides[::2], overrides[1::2], strict=True))


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the leaves of a tree by dotted key; a mapping in ``FREE`` is a single leaf."""
    leaves: dict[str, object] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and name not in FREE:
            leaves.update(flatten(value, f"{key}."))
        else:
            leaves[key] = value
    return leaves


def _coerced(key: str, value: object, default: object, source: str) -> object:
    """Return the value in the default's type; a float accepts an int, a list a tuple."""
    if isinstance(value, str) and not isinstance(default, str):
        value = _parsed(value)
    if isinstance(default, list):
        per_stage = key.rpartition(".")[2] in PER_STAGE
        if per_stage and isinstance(value, int | float) and not isinstance(value, bool):
            value = [value]
        if isinstance(value, list | tuple):
            return [
                _coerced(key, v, _item(key, v, default), source) if default else v for v in value
            ]
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, Mapping) and isinstance(value, Mapping):
        if others := [name for name in value if not isinstance(name, str)]:
            raise ConfigError(f"{source}: {key} expects names as keys, got {others[0]!r}")
        return value
    if default is None or type(value) is type(default):
        return value
    kind = "mapping" if isinstance(default, Mapping) else type(default).__name__
    raise ConfigError(f"{source}: {key} expects a {kind} (default {default!r}), got {value!r}")


def _parsed(text: str) -> object:
    """Parse a word, first as YAML (``true``, ``[a, b]``), then as Python (``1e-4``)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _item(key: str, value: object, default: list) -> object:
    """The default of a list item; a patch size is a side or a pair of sides."""
    is_pair = key.endswith(".PATCH_SIZES") and isinstance(value, list | tuple)
    return default if is_pair else default[0]


def read_leaves(path: str | Path) -> dict[str, object]:
    """Return the values of a YAML file by dotted key, those of its bases first.

    ``_BASE_`` names a file, or a list of files, relative to the file that names it, whose own
    values override theirs.

    Raises:
        ConfigError: a missing file, invalid YAML, anything but plain values (such as a tag that
            would run code), a duplicate key, or a cycle of bases or aliases.
    """
    return _read(Path(path), ())


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, object]:
    """Read a file; ``readers`` are the files that name it, directly or not, as their base."""
    if path.resolve() in readers:
        raise ConfigError(f"{path}: is its own {BASE_KEY}, directly or indirectly")
    tree = read_tree(path)
    bases = tree.pop(BASE_KEY, [])
    leaves: dict[str, object] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ConfigError(
                f"{path}: {BASE_KEY}: expected a file or a list of files, got {base!r}"
            )
        leaves |= _read(path.parent / Path(base).expanduser(), (*readers, path.resolve()))
    try:
        return leaves | flatten(tree)
    except RecursionError as error:
        raise ConfigError(
            f"{path}: a section contains itself, via an alias (*); write its values out"
        ) from error


def read_tree(path: Path) -> dict[str, object]:
    """Return the content of a YAML file as it is; raises as :func:`read_leaves` does."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeysLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: cannot be read as UTF-8 text (byte {error.start}); save it in that encoding"
        ) from error
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(
            f"{path}: only plain YAML values are read, never tags that create objects or run code: "
            f"{error.problem}{error.problem_mark}"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: cannot be read as YAML: nested too deeply") from error
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected a mapping of keys to values, got a {type(tree).__name__}"
        )
    return tree


class UniqueKeysLoader(yaml.SafeLoader):
    """Refuses duplicate keys, of which plain YAML silently keeps the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, yaml.ScalarNode] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                line = first[key.value].start_mark.line + 1
                raise yaml.composer.ComposerError(
                    problem=f"{key.value} is already set on line {line}; merge the two",
                    problem_mark=key.start_mark,
                )
            first[key.value] = key
        return node
