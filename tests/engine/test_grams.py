from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pcka.analysis import patch_grams
from pcka.engine.config import ConfigError
from pcka.engine.grams import chosen_taps, write_grams


def test_the_picture_and_its_values_are_written(tmp_path, capsys):
    torch.manual_seed(0)
    pair = patch_grams(*torch.randn(2, 1, 3, 8, 8), patch_size=4)
    written = write_grams(tmp_path / "new" / "grams", {"p3": pair})
    assert written == [tmp_path / "new" / "grams.png", tmp_path / "new" / "grams.npz"]
    with Image.open(written[0]) as picture:
        assert picture.width > 2 * picture.height > 400
    with np.load(written[1]) as values:
        assert set(values) == {"p3.teacher", "p3.student", "p3.cka"}
        assert np.array_equal(values["p3.student"], pair.student)
        assert np.array_equal(values["p3.cka"], pair.alignment)
    assert f"p3: CKA {pair.cka:.4f} of 4 patches" in capsys.readouterr().out


def test_taps_that_are_not_there_are_named():
    assert chosen_taps(["p4", "p3", "p4"], ["p3", "p4"]) == ["p4", "p3"]
    with pytest.raises(ConfigError, match="--taps: p9 is not tapped; available: p3, p4"):
        chosen_taps(["p3", "p9"], ["p3", "p4"])
