"""Images that cannot be used are named."""

from __future__ import annotations

import pytest
from PIL import Image

from detection.data.mapper import NamingMapper, UnusableImageError


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fault", ["missing", "truncated", "thin", "huge", "other size"])
def test_an_image_that_cannot_be_used_is_named(
    small_config, tmp_path, monkeypatch, training, fault
):
    path = tmp_path / "picture.png"
    size = (4000, 3) if fault == "thin" else (64, 64)
    Image.effect_noise(size, 50).convert("RGB").save(path)
    if fault == "missing":
        path.unlink()
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    if fault == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    width = size[0] + (fault == "other size")
    entry = {"file_name": str(path), "width": width, "height": size[1], "annotations": []}
    with pytest.raises(UnusableImageError, match=r"picture\.png: the image or its annotations"):
        NamingMapper(small_config("student"), training)(entry)
