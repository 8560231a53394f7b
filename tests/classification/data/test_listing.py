from __future__ import annotations

import pytest

from classification.data.listing import class_indices
from pcka.engine.config import ConfigError


def indices(labels, root):
    found, classes = class_indices(labels, root, lambda index: f"row {index}")
    return found.tolist(), classes


def test_classes_are_the_labels_in_alphabetical_order(tmp_path):
    assert indices(["red", "blue", "red", " blue "], tmp_path) == ([1, 0, 1, 0], ("blue", "red"))


@pytest.mark.parametrize("labels", [[10, 2, 1], ["10", "2", "1"]])
def test_numbers_are_in_the_order_of_numbers(tmp_path, labels):
    assert indices(labels, tmp_path) == ([2, 1, 0], ("1", "2", "10"))


def test_a_file_of_classes_says_their_order_and_those_without_an_image(tmp_path):
    (tmp_path / "classes.txt").write_text("red\nblue\n\ngreen\n")
    assert indices(["blue", "red", "2"], tmp_path) == ([1, 0, 2], ("red", "blue", "green"))


def test_a_name_that_is_a_number_goes_before_an_index(tmp_path):
    (tmp_path / "classes.txt").write_text("1\n2\n3\n")
    assert indices([1, 3], tmp_path)[0] == [0, 2]


@pytest.mark.parametrize("label", ["violet", "3", "-1"])
def test_a_label_that_the_file_of_classes_does_not_know_is_refused(tmp_path, label):
    (tmp_path / "classes.txt").write_text("red\nblue\ngreen\n")
    with pytest.raises(
        ConfigError,
        match=rf"^row 1: the label '{label}' is not one of the 3 classes of .*classes.txt",
    ):
        indices(["red", label], tmp_path)


@pytest.mark.parametrize("label", [None, "", "  "])
def test_an_image_without_a_label_is_refused(tmp_path, label):
    with pytest.raises(ConfigError, match=r"^row 1: the image has no label; add one"):
        indices(["red", label], tmp_path)


@pytest.mark.parametrize("label", [1.0, True, [1]])
def test_a_label_of_another_kind_is_refused(tmp_path, label):
    with pytest.raises(ConfigError, match=r"^row 0: the label .* neither text nor an integer"):
        indices([label], tmp_path)
