from __future__ import annotations

import pytest

from pcka.engine.class_names import read_class_names
from pcka.engine.config import ConfigError


def test_names_stand_one_a_line_and_empty_lines_are_none(tmp_path):
    (tmp_path / "classes.txt").write_text("\ufeffred\r\n\n two words \n", encoding="utf-8")
    assert read_class_names(tmp_path / "classes.txt") == ("red", "two words")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"red\nblue\nred\n", r"classes.txt, line 3: the class 'red' is already on line 1"),
        (b"\n", r"classes.txt: expected a class name on each line, found none"),
        ("größe".encode("latin-1"), r"classes.txt: cannot be read as UTF-8 text \(byte 2\)"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, content, message):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_class_names(tmp_path / "classes.txt")
