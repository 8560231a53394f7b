"""The text of ``--help-keys``."""

from __future__ import annotations

from detection.config import detection_config, section_defaults
from pcka.engine.config import flatten
from pcka.engine.help_keys import Key, all_losses, commented_keys, shown

HEADING = """\
Keys that this project adds to detectron2's, with their defaults. Set them as KEY VALUE on the
command line, or in a YAML file. For detectron2's own, see its documentation, "Yacs Configs".
"""


def keys() -> list[Key]:
    """Return every key of this project except those of losses."""
    values = flatten(detection_config())
    return [
        Key(name, values[name], text) for name, text in commented_keys(detection_config).items()
    ]


def all_keys() -> str:
    """Return a text that lists every key of this project with its default and meaning."""
    heading = "Losses: names for DISTILL.METHODS, each with its own section."
    return "\n".join([HEADING, *map(shown, keys()), "", heading, "", all_losses(section_defaults)])
