from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka.analysis import grams_figure, patch_grams, sample_grams

torch.manual_seed(0)
MAPS = torch.randn(2, 1, 3, 8, 12)
PATCHED = patch_grams(*MAPS, patch_size=4)
SAMPLED = sample_grams(*torch.randn(2, 7, 5))


def panels(figure, columns):
    """The rows of axes without colour bars."""
    axes = [ax for ax in figure.axes if ax.images]
    return [axes[start : start + columns] for start in range(0, len(axes), columns)]


def test_a_row_has_teacher_student_and_difference_on_one_symmetric_scale():
    pair = patch_grams(*(MAPS * 3), patch_size=2)
    figure = grams_figure({"p3": PATCHED, "p4": pair})
    first, second = panels(figure, 3)
    shown = [ax.images[0].get_array() for ax in first]
    np.testing.assert_allclose(shown[0], PATCHED.teacher, atol=1e-7)
    np.testing.assert_allclose(shown[1], PATCHED.student, atol=1e-7)
    np.testing.assert_allclose(shown[2], shown[1] - shown[0], atol=1e-7)
    off = ~np.eye(6, dtype=bool)
    limit = max(np.abs(values[off]).max() for values in shown[:2])
    assert {ax.images[0].get_clim() for ax in first} == {(-limit, limit)}
    assert len({ax.images[0].get_clim() for ax in second}) == 1
    assert [ax.get_title() for ax in first] == [
        "teacher", "student", "student \N{MINUS SIGN} teacher",
    ]  # fmt: skip
    assert [row.get_suptitle() for row in figure.subfigs] == [
        f"p3: CKA {PATCHED.cka:.3f}", f"p4: CKA {pair.cka:.3f}",
    ]  # fmt: skip


def test_an_image_is_drawn_first_with_its_patches():
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    (row,) = panels(grams_figure({"p3": PATCHED}, {"p3": image}), 4)
    lines = [line.get_xydata() for line in row[0].get_lines()]
    at = {round(float(xy[0, 1]), 1) for xy in lines if xy[0, 1] == xy[1, 1]}
    assert at == {19.5}  # two rows of patches
    assert {round(float(xy[0, 0]), 1) for xy in lines if xy[0, 0] == xy[1, 0]} == {19.5, 39.5}
    assert row[0].get_xlabel() == "2 x 3 patches"
    assert len(row[1].get_lines()) == 2  # behind the first row of patches, in both directions


def test_classes_are_named_in_their_middle_and_parted():
    (row,) = panels(grams_figure({"stage1": SAMPLED}, classes={"cat": 4, "dog": 3}), 3)
    for axes in row:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["cat", "dog"]
        assert axes.get_xticks().tolist() == [1.5, 5]
        assert {float(line.get_ydata()[0]) for line in axes.get_lines()} >= {3.5}
    named = [[tick.get_text() for tick in axes.get_yticklabels()] for axes in row]
    assert named == [["cat", "dog"], [], []]


@pytest.mark.parametrize("classes", [40, 13])
def test_of_many_classes_none_is_named(classes):
    pair = sample_grams(*torch.randn(2, classes, 5))
    (row,) = panels(grams_figure({"s": pair}, classes={f"c{i}": 1 for i in range(classes)}), 3)
    assert not any(tick.get_text().startswith("c") for tick in row[0].get_xticklabels())
    assert bool(row[0].get_lines()) == (classes < 30)
