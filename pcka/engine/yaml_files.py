"""YAML files of plain values, with bases, whose keys each stand once."""

from __future__ import annotations

from pathlib import Path

import yaml

from pcka.engine.config import ConfigError, flatten

BASE_KEY = "_BASE_"


def read_leaves(path: str | Path) -> dict[str, object]:
    """Return the values of a YAML file by their dotted keys, those of its bases first.

    ``_BASE_`` names a file, or a list of files, relative to the file that names it; what the file
    says itself takes the place of what they say.

    Raises:
        ConfigError: no such file, no YAML, anything but plain values (a tag that would run code
            included), a key that stands twice, or a circle of bases or of aliases.
    """
    return _read(Path(path), ())


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, object]:
    """Read a file for those that name it, directly or not, as their base."""
    if path.resolve() in readers:
        raise ConfigError(f"{path}: is its own {BASE_KEY}, directly or by a circle")
    tree = _tree(path)
    bases = tree.pop(BASE_KEY, [])
    leaves: dict[str, object] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: {BASE_KEY}: expected a file or a list of files: {base!r}")
        leaves |= _read(path.parent / Path(base).expanduser(), (*readers, path.resolve()))
    try:
        return leaves | flatten(tree)
    except RecursionError as error:
        raise ConfigError(
            f"{path}: a section contains itself, by an alias (*); write its values out"
        ) from error


def _tree(path: Path) -> dict[str, object]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: cannot be read as UTF-8 text (byte {error.start}); save it in that encoding"
        ) from error
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(
            f"{path}: only plain YAML values are read, never tags that make objects or run code: "
            f"{error.problem}{error.problem_mark}"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: cannot be read as YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected a mapping of keys to values, got a {type(tree).__name__}"
        )
    return tree


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which plain YAML silently keeps the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, yaml.ScalarNode] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                line = first[key.value].start_mark.line + 1
                raise yaml.composer.ComposerError(
                    problem=f"{key.value} stands twice, on line {line} already; join the two",
                    problem_mark=key.start_mark,
                )
            first[key.value] = key
        return node
