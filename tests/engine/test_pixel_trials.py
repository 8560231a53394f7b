"""Whether another input makes a model clearly better."""

from __future__ import annotations

import pytest
import torch

from pcka.engine.pixel_trials import PixelInput, better_input, is_normal, numbers

OWN = PixelInput([0.5, 0.4, 0.3], [0.2, 0.2, 0.2])
USUAL = {"halves": ([0.5] * 3, [0.5] * 3), "ours": ([0.5, 0.4, 0.3], [0.2] * 3)}


def found(right: dict[PixelInput, int], samples: int = 100):
    """Of models that are right on so many samples; on half of them where nothing is said."""
    asked = []

    def score(given):
        asked.append(given)
        share = next((count for known, count in right if known == given), samples // 2)
        return torch.arange(samples) < share

    return better_input(OWN, USUAL, "BGR", score), asked


def test_each_input_is_tried_once():
    _, asked = found([])
    assert asked[0] == OWN
    assert asked[1:] == [
        PixelInput([0.5] * 3, [0.5] * 3),
        OWN._replace(swapped=True),
        PixelInput([0.3, 0.4, 0.5], [0.2] * 3, True),
    ]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (PixelInput([0.5] * 3, [0.5] * 3), "statistics: halves"),
        (OWN._replace(swapped=True), "channels: BGR"),
        (PixelInput([0.3, 0.4, 0.5], [0.2] * 3, True), "channels: BGR, statistics reversed too"),
    ],
)
def test_a_better_input_is_named(given, name):
    better, _ = found([(given, 70)])
    assert better == (50.0, 70.0, name, given)


@pytest.mark.parametrize(("right", "samples", "is_better"), [
    (59, 100, False),  # three deviations of 9 samples that change are 9 points
    (60, 100, True),
    (1008, 2000, False),
    (1039, 2000, False),  # less than two points
    (1041, 2000, True),
])  # fmt: skip
def test_better_is_more_than_chance_and_two_points(right, samples, is_better):
    better, _ = found([(OWN._replace(swapped=True), right)], samples)
    assert (better.given is not None) == is_better


@pytest.mark.parametrize(
    ("mean", "deviation", "expected"),
    [(0.0, 1.0, True), (1.4, 3.9, True), (-1.6, 1.0, False), (0.0, 0.2, False), (0.0, 5.0, False)],
)
def test_what_counts_as_normalised(mean, deviation, expected):
    assert is_normal(mean, deviation) == expected


def test_numbers_are_such_as_the_command_line_takes():
    assert numbers([123.675, 0.5, 1 / 3]) == "[123.7, 0.5, 0.3333]"
