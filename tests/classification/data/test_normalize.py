from __future__ import annotations

import torch

from classification.data import PixelNormalize


def test_each_channel_has_its_own_statistics():
    images = torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    pixels = PixelNormalize([0.5, 0.5, 0.5], [0.1, 0.2, 0.4])
    expected = torch.tensor([0.0, 0.5, 0.5]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(pixels(images), expected)
    assert not pixels.state_dict()
