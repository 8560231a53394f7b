from __future__ import annotations

from dataclasses import replace

import torch

from classification.data import ResidentSet


def test_the_fingerprint_sees_pixels_labels_and_classes():
    data = ResidentSet(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.arange(4), tuple("abcd"))
    pixels = data.images.clone()
    pixels[3, 2, 1, 1] = 1
    others = [
        replace(data, images=pixels),
        replace(data, labels=data.labels.flip(0)),
        replace(data, classes=tuple("abce")),
    ]
    assert replace(data, images=data.images.clone()).fingerprint == data.fingerprint
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 4
