"""What runs with several seeds say: mean and spread, and which differences are more than noise."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Collection, Mapping, Sequence

from scipy.stats import ttest_1samp

CONFIDENCE = 0.95


def mean_and_deviation(values: Collection[float], *, signed: bool = False) -> str:
    """``mean ± sample standard deviation``; of one value no deviation is known.

    ``nan`` where one of them is, as COCO's figures are of a model that finds nothing.
    """
    if not values:
        return ""
    if any(map(math.isnan, values)):
        return "nan"
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def paired_differences(own: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """``own - other`` of the seeds that both have."""
    return [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]


def verdict(pairs: Sequence[float]) -> str:
    """``above``, ``below``, or ``not shown`` where the interval of the mean difference holds 0.

    The interval is that of the paired t test at :data:`CONFIDENCE`. ``unknown`` where a value is
    not a number.
    """
    if any(map(math.isnan, pairs)):
        return "unknown (nan)"
    if len(pairs) < 2:
        return "unknown (one seed)" if pairs else ""
    with warnings.catch_warnings():
        # Of equal differences, whose interval is a point.
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = ttest_1samp(pairs, 0.0).confidence_interval(CONFIDENCE)
    if low > 0:
        return "above"
    return "below" if high < 0 else "not shown"
