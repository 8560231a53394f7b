"""The public functions: what they refuse, and in which words."""

from __future__ import annotations

import pytest
import torch

import pcka

MAP = torch.zeros(2, 3, 8, 8)
ROWS = torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (ROWS, ROWS[:5], {}, r"same samples.*x \(6, 4\) and y \(5, 4\)"),
        (ROWS, ROWS[None], {}, "y must have 2 dimensions"),
        (ROWS[0], ROWS[0], {}, r"x must have 2 or 3 dimensions, got shape \(4,\)"),
        (ROWS, ROWS.double(), {}, "one dtype, got torch.float32 and torch.float64"),
        (ROWS, ROWS.to("meta"), {}, "one device, got cpu and meta"),
        (ROWS.long(), ROWS.long(), {}, "x must be float16, bfloat16.*got torch.int64"),
        (ROWS[:0], ROWS[:0], {}, r"x must not be empty, got shape \(0, 4\)"),
        ("x", ROWS, {}, "x must be a tensor, got str"),
        (ROWS, ROWS.to_sparse(), {}, r"y must be dense, got torch.sparse_coo; pass y\.to_dense"),
        (ROWS[:3], ROWS[:3], {"unbiased": True}, "at least 4 samples, got N = 3"),
        (ROWS, ROWS, {"unbiased": True, "center": False}, "needs center=True"),
        (ROWS, ROWS, {"unbiased": True, "row_normalize": True}, "not defined for row-normalised"),
    ],
)
def test_cka_refuses(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        pcka.cka(x, y, **options)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (MAP, torch.zeros(2, 5, 8, 8), {}, r"\(2, 3, 8, 8\) and teacher \(2, 5, 8, 8\).*1x1 conv"),
        (MAP, MAP.clone().requires_grad_(), {}, "pass teacher.detach"),
        (MAP[0], MAP[0], {}, "student must have 4 dimensions"),
        (MAP, MAP.half(), {}, "student and teacher must have one dtype"),
        (MAP, MAP, {"patch_size": 0}, "patch_size must be a positive int.*got 0"),
        (MAP, MAP, {"patch_size": (4, 4, 4)}, "patch_size must be"),
        (MAP, MAP, {"patch_size": None}, "patch_size must be a positive int.*got None"),
        (MAP, MAP, {"patch_size": 1.5}, "patch_size must be a positive int.*got 1.5"),
        (MAP, MAP, {"patch_size": (4, 2.0)}, r"patch_size must be .*got \(4, 2\.0\)"),
        (MAP, MAP, {"patch_size": True}, "patch_size must be a positive int.*got True"),
        (MAP, MAP, {"patch_size": "16"}, "patch_size must be a positive int.*got '16'"),
        (MAP, MAP, {"group_by": "pixel"}, "group_by must be one of channel, batch, position"),
        (MAP, MAP, {"relation": "both"}, "relation must be one of rows, columns; got 'both'"),
    ],
)
def test_patch_cka_refuses(student, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        pcka.patch_cka(student, teacher, **options)


def test_patch_gram_refuses():
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        pcka.patch_gram(ROWS)
    with pytest.raises(ValueError, match="group_by must be one of"):
        pcka.patch_gram(MAP, group_by="rows")


def test_no_gradient_is_formed_where_none_is_wanted():
    student, teacher = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert not pcka.patch_cka(student, teacher, patch_size=4).requires_grad
    assert not pcka.patch_cka(teacher, teacher, patch_size=4).requires_grad
