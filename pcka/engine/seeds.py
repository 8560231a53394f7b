"""Statistics over seeds: mean and spread, and which differences are more than noise."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Collection, Mapping, Sequence

from scipy.stats import ttest_1samp

CONFIDENCE = 0.95


def mean_and_deviation(values: Collection[float], *, signed: bool = False) -> str:
    """``mean ± sample standard deviation``; for a single value, the mean alone.

    ``nan`` if any value is, as COCO's metrics are for a model that detects nothing.
    """
    if not values:
        return ""
    if any(map(math.isnan, values)):
        return "nan"
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def paired_differences(own: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """``own - other`` for the seeds that both have."""
    return [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]


def verdict(pairs: Sequence[float]) -> str:
    """``above``, ``below``, or ``not shown`` if the interval of the mean difference contains 0.

    The interval is that of the paired t test at :data:`CONFIDENCE`. ``unknown`` if a value is NaN,
    or for a single seed.
    """
    if any(map(math.isnan, pairs)):
        return "unknown (nan)"
    if len(pairs) < 2:
        return "unknown (one seed)" if pairs else ""
    with warnings.catch_warnings():
        # For equal differences, whose interval is a point.
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = ttest_1samp(pairs, 0.0).confidence_interval(CONFIDENCE)
    if low > 0:
        return "above"
    return "below" if high < 0 else "not shown"
