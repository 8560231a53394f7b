from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from classification.data import load_image_sets
from classification.data.source import _SOURCES, BUILT_IN
from pcka.engine.config import ConfigError

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text()


@pytest.mark.parametrize("key", ["TRAIN_PART", "TEST_PART", "IMAGE_COLUMN", "LABEL_COLUMN"])
def test_a_key_that_the_data_set_does_not_read_is_refused(streaming_config, key):
    expected = rf"DATA.{key}: is for huggingface, .* is 'folder'; leave"
    with pytest.raises(ConfigError, match=expected):
        load_image_sets(streaming_config(**{f"DATA.{key}": "x"}))


def test_the_page_of_formats_names_every_data_set():
    named = set(re.findall(r"`(\w+)`", PAGE.partition("## Detection")[0]))
    assert BUILT_IN.keys() <= named


@pytest.fixture
def my_list(noisy_root, monkeypatch):
    """The page's example, in the working folder; forgotten afterwards."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (noisy_root / "my_list.py").write_text(code)
    monkeypatch.chdir(noisy_root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "my_list"
    sys.modules.pop("my_list", None)
    _SOURCES.pop("list", None)


@pytest.mark.parametrize("stream", [False, True])
def test_the_pages_own_format_is_read_as_the_folder_is(
    my_list, streaming_config, noisy_root, stream
):
    for split, folder in (("train", "train"), ("test", "val")):
        paths = [path.relative_to(noisy_root) for path in sorted((noisy_root / folder).glob("*/*"))]
        lines = [f"{path} {path.parent.name}\n" for path in paths]
        (noisy_root / f"{split}.txt").write_text("".join(lines))
    keys = {"DATA.STREAM": stream}
    ours = load_image_sets(streaming_config(IMPORTS="[my_list]", **{"DATA.NAME": "list", **keys}))
    theirs = load_image_sets(streaming_config(**keys))
    for one, other in zip(ours, theirs, strict=True):
        batches = next(one.evaluation_batches()), next(other.evaluation_batches())
        assert all((a == b).all() for a, b in zip(*batches))
