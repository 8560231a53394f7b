"""detectron2's configuration, stricter about files and more lenient about numbers."""

from __future__ import annotations

from typing import IO

import yaml
from detectron2.config import CfgNode

from pcka.engine.config import UniqueKeysLoader


class ConfigNode(CfgNode):
    """Refuses duplicate keys in a file or its bases; accepts an int where a float is expected."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        with super()._open_cfg(filename) as file:
            yaml.compose(file, Loader=UniqueKeysLoader)
        return super()._open_cfg(filename)

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        """Merge another configuration, whose ints become floats where this one has floats."""
        given = cfg_other.clone()
        _ints_to_floats(given, self)
        super().merge_from_other_cfg(given)


def _ints_to_floats(given: CfgNode, known: CfgNode) -> None:
    for name, value in given.items():
        expected = known.get(name)
        if isinstance(value, CfgNode) and isinstance(expected, CfgNode):
            _ints_to_floats(value, expected)
        elif isinstance(expected, float) and type(CfgNode._decode_cfg_value(value)) is int:
            given[name] = float(value)
