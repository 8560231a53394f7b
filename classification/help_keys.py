"""The text of ``--help-keys``."""

from __future__ import annotations

from classification.config import default_config
from pcka.engine.config import flatten
from pcka.engine.help_keys import Key, all_losses, commented_keys, shown

HEADING = """\
Keys with their defaults: KEY VALUE on the command line, or sections of a YAML file.
"""


def keys() -> list[Key]:
    """Return every key except those of losses."""
    texts = commented_keys(default_config)
    return [Key(name, value, texts[name]) for name, value in flatten(default_config()).items()]


def all_keys() -> str:
    """Return every key with its default and its meaning."""
    lines, section = [HEADING], None
    for key in keys():
        before, section = section, key.name.rpartition(".")[0]
        lines += [""] * (section != before and before is not None)
        lines.append(shown(key))
    lines += ["", "Losses: names for DISTILL.METHODS, each with its own section.", ""]
    return "\n".join([*lines, all_losses()])
