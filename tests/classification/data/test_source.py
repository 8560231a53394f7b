from __future__ import annotations

import pytest

from classification.data import load_image_sets
from pcka.engine.config import ConfigError


@pytest.mark.parametrize("key", ["TRAIN_PART", "TEST_PART", "IMAGE_COLUMN", "LABEL_COLUMN"])
def test_a_key_that_the_data_set_does_not_read_is_refused(streaming_config, key):
    with pytest.raises(
        ConfigError, match=rf"DATA.{key}: is for huggingface, .* is 'folder'; leave"
    ):
        load_image_sets(streaming_config(**{f"DATA.{key}": "x"}))
