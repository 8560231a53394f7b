"""Images that cannot be used are named."""

from __future__ import annotations

import pytest
from PIL import Image

from detection.data.mapper import NamingMapper, UnusableImageError, make_mapper


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


@pytest.mark.parametrize(
    ("architecture", "order"),
    [
        ("SemanticSegmentor", ["ResizeShortestEdge", "RandomCrop"]),
        ("PanopticFPN", ["RandomCrop", "ResizeShortestEdge"]),
        ("RetinaNet", ["RandomCrop", "ResizeShortestEdge"]),
    ],
)
def test_crops_are_taken_after_resizing_for_segmenters_alone(small_config, architecture, order):
    keys = ("MODEL.META_ARCHITECTURE", architecture, "INPUT.CROP.ENABLED", "True")
    mapper = make_mapper(small_config("student", *keys), training=True)
    assert [type(step).__name__ for step in mapper.augmentations.augs][:2] == order
