from __future__ import annotations

from detectron2.layers import ShapeSpec

from detection.levels import match_levels, patch_for, patches

FPN = {f"p{level}": ShapeSpec(channels=8, stride=2**level) for level in range(3, 8)}


def test_the_first_four_levels_by_default():
    shuffled = dict(reversed(FPN.items()))
    assert match_levels([], shuffled, FPN) == {level: level for level in ("p3", "p4", "p5", "p6")}


def test_pairs_of_names():
    assert match_levels(["p4:p3", "p5"], FPN, FPN) == {"p4": "p3", "p5": "p5"}


def test_patches_of_a_square_image():
    assert patches(256, 8, 16) == 4
    assert patches(250, 8, 16) == 4  # both divisions round up
    assert patch_for(256, 8) == 8
    assert patches(256, 8, 8) == 16
    assert patch_for(64, 32) == 1
