from __future__ import annotations

import math

import pytest

from pcka.engine.seeds import mean_and_deviation, paired_differences, verdict

T_95 = {1: 12.7062, 2: 4.3027, 4: 2.7764}  # two-sided, by degrees of freedom, from a table


def test_mean_and_sample_deviation():
    assert mean_and_deviation([1.0, 2.0, 4.5]) == "2.50 ± 1.80"
    assert mean_and_deviation([-1.0, 0.0], signed=True) == "-0.50 ± 0.71"
    assert mean_and_deviation([1.0, 2.0], signed=True) == "+1.50 ± 0.71"
    assert mean_and_deviation({3: 71.234}.values()) == "71.23"
    assert mean_and_deviation([0.5], signed=True) == "+0.50"
    assert mean_and_deviation([]) == ""


def test_differences_pair_the_seeds_that_both_have():
    assert paired_differences({2: 5.0, 0: 3.0, 7: 1.0}, {0: 1.0, 2: 4.0, 1: 9.0}) == [2.0, 1.0]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_difference_is_named_where_its_interval_leaves_out_zero(seeds):
    # Differences mean + {-1, 0, 1}-like deviations whose sample deviation is known.
    deviations = [-1.0, 1.0] + [0.0] * (seeds - 2)
    spread = math.sqrt(2 / (seeds - 1))
    margin = T_95[seeds - 1] * spread / math.sqrt(seeds)
    for factor, expected in (
        (1.01, "above"), (0.99, "not shown"), (-0.99, "not shown"), (-1.01, "below"),
    ):  # fmt: skip
        assert verdict([factor * margin + deviation for deviation in deviations]) == expected


def test_verdicts_of_equal_differences_one_seed_and_none():
    assert verdict([0.0, 0.0, 0.0]) == "not shown"
    assert verdict([0.25, 0.25]) == "above"
    assert verdict([-0.25, -0.25]) == "below"
    assert verdict([3.0]) == "unknown (one seed)"
    assert verdict([]) == ""


def test_what_is_no_number_is_called_so():
    assert mean_and_deviation([math.nan, 20.0]) == mean_and_deviation([math.nan]) == "nan"
    assert verdict([math.nan, 20.0]) == verdict([math.nan]) == "unknown (nan)"
