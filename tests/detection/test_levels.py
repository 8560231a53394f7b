from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from torch.nn import functional as F

from detection.levels import match_levels, match_map, patch_for, patches

FPN = {f"p{level}": ShapeSpec(channels=8, stride=2**level) for level in range(3, 8)}


def test_the_first_four_levels_by_default():
    shuffled = dict(reversed(FPN.items()))
    assert match_levels([], shuffled, FPN) == {level: level for level in ("p3", "p4", "p5", "p6")}


def test_pairs_of_names():
    assert match_levels(["p4:p3", "p5"], FPN, FPN) == {"p4": "p3", "p5": "p5"}


def test_maps_of_one_size_are_handed_on_untouched():
    teacher = torch.rand(1, 2, 8, 12)
    assert torch.equal(match_map(teacher, (64, 96), 8, (8, 12)), teacher)


def test_what_lies_beyond_the_students_images_is_cut_off():
    # The student padded to 40 x 72, the teacher to 64 x 96.
    teacher = torch.rand(1, 2, 8, 12)
    assert torch.equal(match_map(teacher, (40, 72), 8, (5, 9)), teacher[:, :, :5, :9])


def test_another_stride_is_resized_over_the_same_area():
    teacher = torch.rand(1, 2, 8, 12)
    expected = F.interpolate(teacher[:, :, :5, :9], (10, 18), mode="bilinear", align_corners=False)
    assert torch.equal(match_map(teacher, (40, 72), 8, (10, 18)), expected)


def test_patches_of_a_square_image():
    assert patches(256, 8, 16) == 4
    assert patches(250, 8, 16) == 4  # both divisions round up
    assert patch_for(256, 8) == 8
    assert patches(256, 8, 8) == 16
    assert patch_for(64, 32) == 1
