"""The text of ``--help-keys``."""

from __future__ import annotations

from classification.config import default_config
from pcka.engine.config import flatten
from pcka.engine.help_keys import Key, all_losses, commented_keys, shown

HEADING = """\
Keys with their defaults: KEY VALUE on the command line, or sections of a YAML file.
"""


def all_keys() -> str:
    """Return every key with its default and its meaning."""
    texts, lines, section = commented_keys(default_config), [HEADING], None
    for name, default in flatten(default_config()).items():
        before, section = section, name.rpartition(".")[0]
        lines += [""] * (section != before and before is not None)
        lines.append(shown(Key(name, default, texts[name])))
    lines += ["", "Losses: what DISTILL.METHODS may name, each with a section of its own.", ""]
    return "\n".join([*lines, all_losses()])
