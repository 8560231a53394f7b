"""Which trainer a configuration file is for, judging by its sections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from pcka.engine.config import BASE_KEY, ConfigError

# Trainer -> sections that only its files have; detectron2's are upper case too.
SECTIONS = {
    "classification": {"DATA", "STUDENT", "TEACHER"},
    "detection": {"MODEL", "DATASETS", "DATALOADER", "INPUT", "TEST", "VERSION"},
}


def trainer_of(path: Path, keys: Iterable[str] = ()) -> str:
    """Return "classification" or "detection".

    The file's own sections decide, else those of its bases, else the keys. Nothing is validated
    here.

    Args:
        path: YAML file.
        keys: dotted keys from the command line.

    Raises:
        ConfigError: a file for neither trainer, with sections of both, or that cannot be read.
    """
    for sections in (*_sections(path, ()), {key.partition(".")[0] for key in keys}):
        found = [trainer for trainer, own in SECTIONS.items() if sections & own]
        if len(found) == 1:
            return found[0]
        if found:
            both = (", ".join(sorted(sections & own)) for own in SECTIONS.values())
            raise ConfigError(
                f"{path}: is it a classifier's or a detector's? It has sections of both "
                f"({' and '.join(both)}); remove those of one"
            )
    raise ConfigError(
        f"{path}: is not a training configuration: a classifier's has sections such as DATA, "
        "STUDENT and TEACHER, a detector's or segmenter's MODEL and DATASETS"
    )


def _sections(path: Path, readers: tuple[Path, ...]) -> Iterator[set[str]]:
    """Yield the names of a file's sections, then those of its bases."""
    try:
        # Only the structure: tags and values are for the trainer to check.
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, yaml.MappingNode):
        return
    named = {key.value: value for key, value in tree.value if isinstance(key, yaml.ScalarNode)}
    yield set(named)
    base = named.get(BASE_KEY)
    for node in base.value if isinstance(base, yaml.SequenceNode) else [base]:
        if isinstance(node, yaml.ScalarNode):
            file = path.parent / Path(node.value).expanduser()
            if file.resolve() not in readers and file.is_file():
                yield from _sections(file, (*readers, path.resolve()))
